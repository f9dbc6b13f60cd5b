"""The actor on each node: it starts, watches and ends the node's process for the driver.

It is sent by value with `run.sync`, and both import only the standard library. A node therefore
needs only Ray to report what else it lacks.
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

# Run by the interpreter that will train: prints its packages and their versions.
_LIST_PACKAGES = """
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
# Checks that the runs URL is writable from this node.
_CHECK_URL = """
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
        self._last_heartbeat = time.monotonic()
        self._folder = ""
        self._scanner: ChangeScanner | None = None

    def inspect(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the node's properties and the versions of its packages.

        Args:
            request: a dictionary with `python` or None, `packages`, and `probe`, the run's probe
                directory. Where nodes share no disk, it has `url`, the runs URL, and its variables
                `env` instead.
        """
        python = request["python"] or sys.executable
        found = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "python": python,
            "probe_file": _touch_probe(request["probe"]) if request["probe"] else "",
            **_packages(python, request["packages"]),
        }
        if request.get("url") and not found["error"] and None not in found["versions"].values():
            found["error"] = _url_error(request["url"], python, request["env"])
        return found

    def create_run_dir(self, run_id: str, package: bytes) -> str:
        """Create a run directory for this node alone, and return its path. See `run.sync`."""
        self._folder = sync.create_local_run_dir(run_id, package)
        self._scanner = ChangeScanner(self._folder)
        self._scanner.skip_present()
        return self._folder

    def remove_run_dir(self) -> None:
        if self._folder:
            sync.remove_local_run_dir(self._folder)

    def listen(self, host: str, candidates: list[int]) -> int:
        """Open the port of the rendezvous: the first free one of these. Return 0 when none is
        free."""
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
        """Start the node's process. It ends with this actor, for any cause."""
        self._last_heartbeat = time.monotonic()
        threading.Thread(target=self._run_process, args=(argv, cwd, log), daemon=True).start()
        threading.Thread(target=self._fence, args=(lost_after_s,), daemon=True).start()

    def heartbeat(self, wait_s: float) -> tuple[int | None, list[dict[str, Any]]]:
        """Record a heartbeat of the driver. Return the exit code, and changes in a local run
        directory.

        The exit code is None if there was none within `wait_s`, and until all changes have been
        reported.
        """
        self._last_heartbeat = time.monotonic()
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
            os.killpg(process.pid, number)  # all processes that it forked die with it
        else:
            process.send_signal(number)

    def _run_process(self, argv: list[str], cwd: str, log: str) -> None:
        """Start the process and wait for it in the same thread, because it dies when that thread
        ends."""
        argv = [*argv, "--parent", str(os.getpid())]
        listen_fds = []
        if self._listener is not None:
            listen_fds = [self._listener.fileno()]
            argv += ["--listen-fd", str(listen_fds[0])]
        try:
            os.makedirs(os.path.dirname(log), exist_ok=True)
            with open(log, "ab") as file:
                self._process = subprocess.Popen(
                    argv,
                    cwd=cwd if os.path.isdir(cwd) else None,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    pass_fds=listen_fds,
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
        """End the workers after `lost_after_s` without a heartbeat. The run continues without this
        node."""
        while not self._ended.wait(min(1.0, lost_after_s / 4)):
            if time.monotonic() - self._last_heartbeat > lost_after_s:
                self.signal(signal.SIGKILL)


def _output_of(argv: list[str], timeout_s: float, env: dict[str, str]) -> tuple[str, str]:
    """Return the output of a command, and the last line of its stderr if it fails.

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
    error = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return done.stdout, error if done.returncode else ""


def _url_error(url: str, python: str, env: dict[str, str]) -> str:
    """Return why the runs URL is not writable from here; empty when it is."""
    try:
        return _output_of([python, "-P", "-c", _CHECK_URL, url], 100, env)[1]
    except (OSError, subprocess.TimeoutExpired):
        return f"{url} does not answer"


def _packages(python: str, names: list[str]) -> dict[str, Any]:
    """Return `versions` of packages, None for a missing one, and `error`, that of the query."""
    try:
        found, failure = _output_of([python, "-P", "-c", _LIST_PACKAGES, *names], 60, {})
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"versions": {}, "error": f"{python} cannot be run: {error}"}
    if failure:
        return {"versions": {}, "error": f"{python} failed: {failure}"}
    return {"versions": json.loads(found), "error": ""}


def _touch_probe(folder: str) -> str:
    """Check for the driver's file in the run directory, and create one. Return its name, or ``.

    NFS may show a new file late, but shows it in a new listing.
    """
    deadline = time.monotonic() + 5
    while True:
        try:
            if "driver" in os.listdir(folder):
                name = f"node-{socket.gethostname()}-{os.getpid()}"
                with open(os.path.join(folder, name), "w"):
                    return name
        except OSError:
            if not os.path.isdir(os.path.dirname(os.path.dirname(folder))):
                return ""  # even the run directory is missing
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.1)
