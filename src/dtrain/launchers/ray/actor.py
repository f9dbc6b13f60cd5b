"""What the driver has on each node: an actor that starts, watches and ends the node's process.

Sent by value with `run.sync`, and the standard library is all that they import: a node needs no
more than Ray to say what else it lacks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from dtrain.run import sync
from dtrain.run.sync import ChangeScanner

# Run by the interpreter that is to train: what it has, and in which version.
_LOOK = """
import importlib.metadata as m, importlib.util as u, json, sys
found = {}
for name in sys.argv[1:]:
    top = name.partition(".")[0]
    try:
        found[top] = m.version(top) if u.find_spec(name) else None
    except m.PackageNotFoundError:
        found[top] = "?"
    except ModuleNotFoundError:
        found[top] = None
print(json.dumps(found))
"""
# Whether the place of runs can be written to from here.
_REACH = """
import sys
from dtrain.errors import DtrainError
from dtrain.run.remote.store import RemoteStore
try:
    RemoteStore(sys.argv[1]).check()
except DtrainError as error:
    sys.exit(str(error))
"""


class NodeActor:
    """One node of a run. Methods are called from several threads of the actor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._code: int | None = None
        self._ended = threading.Event()
        self._heard = time.monotonic()
        self._folder = ""
        self._scanner: ChangeScanner | None = None

    def look(self, wish: dict[str, Any]) -> dict[str, Any]:
        """What this node is and has.

        Args:
            wish: `python` or None, `packages`, and `probe`, the run's probe folder, or where
                nodes share no disk `url`, the place of runs, with the variables `env`.
        """
        python = wish["python"] or sys.executable
        found = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "python": python,
            "sees_run": _leave_word(wish["probe"]) if wish["probe"] else "",
            **_packages(python, wish["packages"]),
        }
        if wish.get("url") and not found["trouble"] and None not in found["versions"].values():
            found["trouble"] = _trouble_at(wish["url"], python, wish["env"])
        return found

    def settle(self, run_id: str, package: bytes) -> str:
        """Make a run directory for this node alone; its path. See `run.sync`."""
        self._folder = sync.create_local_run_dir(run_id, package)
        self._scanner = ChangeScanner(self._folder)
        self._scanner.skip_present()
        return self._folder

    def leave(self) -> None:
        if self._folder:
            sync.remove_local_run_dir(self._folder)

    def listen(self, host: str, candidates: list[int]) -> int:
        """Open the port of the rendezvous, the first of these that is free; 0 when none is."""
        for port in candidates:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
                sock.listen(2048)
            except OSError:
                sock.close()
                continue
            self._listener = sock
            return port
        return 0

    def start(self, argv: list[str], cwd: str, log: str, lost_after_s: float) -> None:
        """Start the node's process, which ends with this actor, however that ends."""
        self._heard = time.monotonic()
        threading.Thread(target=self._keep, args=(argv, cwd, log), daemon=True).start()
        threading.Thread(target=self._fence, args=(lost_after_s,), daemon=True).start()

    def beat(self, wait_s: float) -> tuple[int | None, list[dict[str, Any]]]:
        """Hear that the driver lives; the exit code, and what is new in a directory of our own.

        The exit code is None after a while without one, and until all that is new has been told.
        """
        self._heard = time.monotonic()
        self._ended.wait(wait_s)
        code = self._code
        changes = self._scanner.next_changes() if self._scanner is not None else []
        return (None if changes else code), changes

    def signal(self, number: int) -> None:
        """Pass a signal on to the node's process."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)  # all that it forked dies with it
        else:
            process.send_signal(number)

    def _keep(self, argv: list[str], cwd: str, log: str) -> None:
        """Start the process and wait for it, in one thread: it dies with the thread's end."""
        argv = [*argv, "--parent", str(os.getpid())]
        keep = []
        if self._listener is not None:
            keep = [self._listener.fileno()]
            argv += ["--listen-fd", str(keep[0])]
        try:
            os.makedirs(os.path.dirname(log), exist_ok=True)
            with open(log, "ab") as file:
                self._process = subprocess.Popen(
                    argv,
                    cwd=cwd if os.path.isdir(cwd) else None,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    pass_fds=keep,
                    start_new_session=True,
                )
            if self._listener is not None:
                self._listener.close()
            code = self._process.wait()
            self._code = code if code >= 0 else 128 - code
        except OSError as error:
            print(f"dtrain: cannot start {argv[0]}: {error}", file=sys.stderr)
            self._code = 127
        self._ended.set()

    def _fence(self, lost_after_s: float) -> None:
        """End the workers when nothing was heard for a while: the run goes on without us."""
        while not self._ended.wait(min(1.0, lost_after_s / 4)):
            if time.monotonic() - self._heard > lost_after_s:
                self.signal(signal.SIGKILL)


def _ask(argv: list[str], timeout_s: float, env: dict[str, str]) -> tuple[str, str]:
    """What a command prints, and its last words where it fails.

    Raises:
        OSError, subprocess.TimeoutExpired: it cannot be run.
    """
    done = subprocess.run(
        argv,
        env={**os.environ, **env},
        capture_output=True,
        encoding="utf-8",
        timeout=timeout_s,
        check=False,
    )
    words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return done.stdout, words if done.returncode else ""


def _trouble_at(url: str, python: str, env: dict[str, str]) -> str:
    """Why the place of runs cannot be written to from here; empty when it can."""
    try:
        return _ask([python, "-P", "-c", _REACH, url], 100, env)[1]
    except (OSError, subprocess.TimeoutExpired):
        return f"{url} does not answer"


def _packages(python: str, names: list[str]) -> dict[str, Any]:
    """`versions` of packages, None for one that is missing; `trouble` in asking."""
    try:
        found, trouble = _ask([python, "-P", "-c", _LOOK, *names], 60, {})
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"versions": {}, "trouble": f"{python} cannot be run: {error}"}
    if trouble:
        return {"versions": {}, "trouble": f"{python} failed: {trouble}"}
    return {"versions": json.loads(found), "trouble": ""}


def _leave_word(folder: str) -> str:
    """Look for the driver's file in the run directory, and leave one; the name of ours, or ``.

    NFS may show a new file late, but shows it in a new listing.
    """
    deadline = time.monotonic() + 5
    while True:
        try:
            if "driver" in os.listdir(folder):
                mine = f"node-{socket.gethostname()}-{os.getpid()}"
                with open(os.path.join(folder, mine), "w"):
                    return mine
        except OSError:
            if not os.path.isdir(os.path.dirname(os.path.dirname(folder))):
                return ""  # not even the run's folder
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.1)
