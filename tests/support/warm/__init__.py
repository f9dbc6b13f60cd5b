"""A warm interpreter: commands of dtrain are forked from it, where torch is imported already.

A small launch spends 3.5 of its 4.5 CPU seconds on `import torch` and `torch._dynamo` (2 cores,
2026-11), and the tests make hundreds. Here one process of each pytest process imports them once.
`Popen` has it fork `python -m dtrain …`, and such a command forks the `python -m dtrain.node` that
it would have started. All else is as in a cold start, which begins with a new interpreter:
arguments, environment, directory, descriptors, signals, exit status, and which command is the
parent of which node.

For what shells, Slurm and Ray start there is a program that stands for the process, asks for it,
passes signals on and ends as it does (`programs`).

A test with the marker `cold` starts its commands as a person does; one must, if it puts another
module in the place of one that is imported already.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.warm import wire

_HERE = Path(__file__).parent
_LEFT_S = 2.0
"""How long what a test has ended may take to be gone."""

is_cold = False
"""Set while a test with the marker `cold` runs."""
_server: _Server | None = None


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` of a Python command; `python -m dtrain …` is forked from the server."""

    _connection: socket.socket | None = None
    """Where the exit of a process is told that is not our child; None of one that is."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        argv = [os.fspath(arg) for arg in args]
        ours = argv[:3] == [sys.executable, "-m", "dtrain"]
        if is_cold or not ours or _server is None:  # the ranks of a test have no server
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        _server.check()
        cwd, env = rest[4], rest[5]
        stdin, stdin_ours, stdout_ours, stdout, stderr_ours, stderr = rest[9:15]
        given = enumerate((stdin, stdout, stderr))
        self._connection, self.pid = wire.request(
            _server.address,
            "dtrain",
            argv[3:],
            cwd=cwd or os.getcwd(),
            env=os.environ if env is None else env,
            files={own: own if fd < 0 else fd for own, fd in given},
        )
        self._child_created = True
        self._close_pipe_fds(stdin, stdin_ours, stdout_ours, stdout, stderr_ours, stderr)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._connection is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]
        if not select.select([self._connection], [], [], 0 if wait_flags else None)[0]:
            return 0, 0
        with self._connection:
            code = wire.exit_code(self._connection)
        return self.pid, code << 8 if code >= 0 else -code

    def _internal_poll(self, _deadstate: int | None = None, *_: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(_deadstate)  # type: ignore[misc, no-any-return]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


class _Server:
    """The warm process, as seen by the pytest process that started it and with which it ends."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dtrain-warm-"))
        self.address = f"{self.folder}/socket"
        _write_programs(self.folder, self.address)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with us
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            fd, pid = str(listener.fileno()), str(os.getpid())
            self._process = subprocess.Popen(
                [sys.executable, "-P", _HERE / "server.py", fd, pid],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[listener.fileno()],
                env={**os.environ, "PYTHONHASHSEED": "0"},  # that of a run, unless it says another
                start_new_session=True,  # a Ctrl-C is for pytest, whose end ends it
            )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()
        shutil.rmtree(self.folder)

    def leftovers(self) -> list[str]:
        """A line for each process that a test has left below the server; they are ended."""
        import psutil

        mine = psutil.Process(self._process.pid)
        deadline = time.monotonic() + _LEFT_S
        while (found := mine.children(recursive=True)) and time.monotonic() < deadline:
            psutil.wait_procs(found, timeout=0.05)
        lines = [f"process {process.pid}, forked from the warm server" for process in found]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return lines

    def check(self) -> None:
        if self._process.poll() is not None:  # with what it said
            self._said.seek(0)
            raise RuntimeError(f"the warm server ended:\n{self._said.read().decode()}")


def start() -> None:
    """Have a server in this process; it imports what it needs while the test begins.

    Call it from the main thread: the kernel ends the server together with the thread.
    """
    global _server
    if _server is None:
        _server = _Server()
    _server.check()


def close() -> None:
    """End the server, if there is one."""
    global _server
    if _server is not None:
        _server.close()
        _server = None


def leftovers() -> list[str]:
    """A line for each process of a test's that still runs; it is ended."""
    return [] if _server is None else _server.leftovers()


def programs() -> Path:
    """A directory with `dtrain`, for shells, and `python`, for clusters, as `-m dtrain.node`."""
    assert _server is not None
    return _server.folder


def _write_programs(folder: Path, address: str) -> None:
    """Once, before anything is started: a file that is open for writing cannot be executed."""
    ask = f"exec {sys.executable} -S -E {_HERE / 'program.py'} {address}"
    ours = '[ "$1 $2 $3" = "-P -m dtrain.node" ]'
    node = f'if {ours}; then shift 3; {ask} dtrain.node "$@"; fi'
    for name, text in {
        "dtrain": f'{ask} dtrain "$@"',
        "python": f'{node}\nexec {sys.executable} "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
