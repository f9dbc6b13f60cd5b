"""The warm server: `server.py SOCKET_FD PARENT_PID` imports torch once, and forks what is asked.

See the package's docstring. The server never has a second thread, so that it may fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dtrain import procs
from dtrain.forking import ONE_THREAD, Channel, Children, import_once

_STRATEGIES = ("ddp", "dp", "exact.strategy", "fsdp")
_WITH_TORCH = ("dtrain.node", "dtrain.node.warm", "dtrain.export")
_NAMESPACES = ("net", "uts", "ipc", "pid", "mnt")
"""`mnt` last: it brings another /proc."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_PATH = [path for path in sys.path if path not in os.environ.get("PYTHONPATH", "").split(":")]
"""Of an interpreter without PYTHONPATH and without the directory that it is started in."""


@dataclass
class _Asked:
    """A process that somebody waits for."""

    channel: Channel
    pid: int
    """Whose end is its end; our child."""
    target: int
    """Who gets its signals: itself, or its child in other namespaces."""


def serve(listener: socket.socket) -> NoReturn:
    _import_all()
    children = Children()
    running: list[_Asked] = []
    while True:
        ready = children.wait([listener, *(asked.channel for asked in running)])
        for asked in [each for each in running if each.channel.fileno() in ready]:
            _pass_on(asked)
        if listener.fileno() in ready:
            channel = Channel(listener.accept()[0])
            try:
                running.append(_start(channel))
            except (OSError, EOFError):  # who asks has ended already
                channel.close()
        for ended in children.reap():
            for asked in [each for each in running if each.pid == ended.pid]:
                running.remove(asked)
                with contextlib.suppress(OSError):
                    asked.channel.send({"code": ended.code})
                asked.channel.close()


def _import_all() -> None:
    """Import what a launch of any strategy under either trainer does; one thread stays."""
    import importlib.util

    before = dict(os.environ)
    os.environ.update(ONE_THREAD)
    modules = ["dtrain.cli.main", "dtrain.launchers.supervise", "torch._dynamo"]
    modules += ["dtrain.node.agent_process", "dtrain.node.worker", "dtrain.node.fork_server"]
    modules += ["dtrain.train.loop.native"]
    modules += [f"dtrain.train.strategies.{name}" for name in _STRATEGIES]
    if importlib.util.find_spec("pytorch_lightning"):
        modules.append("pytorch_lightning")
    threads = import_once(modules)
    os.environ.clear()
    os.environ.update(before)
    assert not threads, "a fork would lose the other threads"


def _start(channel: Channel) -> _Asked:
    """Fork what a process asks for; `OSError` or `EOFError` when that process has ended."""
    told, files = channel.receive_with_files(wait_s=None)
    assert told is not None, "we wait for ever"
    spaces: list[int] = []
    try:
        if told["enter"]:
            spaces = _namespaces_of(_peer(channel.sock))

        def fork() -> int:
            fds = dict(zip(told["numbers"], files, strict=True))
            return _fork(told["module"], told["arguments"], told["cwd"], told["env"], fds)

        pid, target = _fork_within(spaces, fork) if spaces else (forked := fork(), forked)
    finally:
        for fd in (*files, *spaces):
            os.close(fd)
    with contextlib.suppress(OSError):  # the next look at the connection finds its end, too
        channel.send({"pid": target})
    return _Asked(channel, pid, target)


def _peer(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return int(pid)


def _pass_on(asked: _Asked) -> None:
    """Do what the asker wants: a signal; or it has ended, and so does what it asked for."""
    number = signal.SIGKILL
    with contextlib.suppress(EOFError):
        number = (asked.channel.receive() or {})["signal"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(asked.target, number)


# ---------------------------------------------------------------------- another host's namespaces


def _namespaces_of(pid: int) -> list[int]:
    """Descriptors of the namespaces of a process that are not ours."""
    own, other = Path("/proc/self/ns"), Path(f"/proc/{pid}/ns")
    differ = [n for n in _NAMESPACES if os.readlink(own / n) != os.readlink(other / n)]
    return [os.open(other / name, os.O_RDONLY) for name in differ]


def _fork_within(spaces: Sequence[int], fork: Any) -> tuple[int, int]:
    """Fork in other namespaces: the pid of a child that waits for it and ends as it does, its pid.

    A process's own pid stays what it is; only its children are in the other pid namespace.
    """
    told, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        with open(told) as file:
            return pid, int(file.read() or pid)  # nothing: it ends at once, with an error
    try:
        procs.die_with_parent(os.getppid())
        for space in spaces:
            if _LIBC.setns(space, 0) != 0:
                raise OSError(ctypes.get_errno(), "setns failed")
        target = fork()
        os.write(tell, str(target).encode())
        os.close(tell)
        code = os.waitstatus_to_exitcode(os.waitpid(target, 0)[1])
        if code < 0:
            procs._reset_signals()
            os.kill(os.getpid(), -code)
        os._exit(code)
    finally:
        os._exit(1)


# ---------------------------------------------------------------------- in what was forked


class _Forking(subprocess.Popen[Any]):
    """`subprocess.Popen` inside a command: what would import torch is a fork of ourselves."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        argv = [args] if isinstance(args, str) else [os.fspath(arg) for arg in args]
        ours = argv[:3] == [sys.executable, "-P", "-m"] and argv[3] in _WITH_TORCH
        if not ours or len(os.listdir("/proc/self/task")) > 1:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        pass_fds, cwd, env = rest[3:6]
        stdin, stdin_ours, stdout_ours, stdout, stderr_ours, stderr = rest[9:15]
        files = {fd: fd for fd in pass_fds}
        for own, given in enumerate((stdin, stdout, stderr)):
            files[own] = own if given < 0 else given
        env = os.environ if env is None else env
        self.pid = _fork(argv[3], argv[4:], cwd, env, files, new_session=rest[20])
        self._child_created = True
        self._close_pipe_fds(stdin, stdin_ours, stdout_ours, stdout, stderr_ours, stderr)  # type: ignore[attr-defined]


def _fork(
    module: str, arguments: Sequence[str], cwd: str | None, env: Mapping[str, str],
    files: Mapping[int, int], *, new_session: bool = False,
) -> int:  # fmt: skip
    """Fork `python -m MODULE ARGUMENTS`, with -P but for the command itself; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if new_session:
            os.setsid()
        _become(cwd, dict(env), files, finds_modules_here=module == "dtrain")
        status = _run_module(module, arguments)
    finally:
        os._exit(status)


def _become(
    cwd: str | None, env: dict[str, str], files: Mapping[int, int], *, finds_modules_here: bool
) -> None:
    """Set what a new interpreter has: files, directory, environment, signals, randomness."""
    import atexit
    import random

    import numpy as np

    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # when pytest is killed, so are we
    high = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, 256) for number, fd in files.items()}
    for number, fd in high.items():
        os.dup2(fd, number)
    procs._close_all_but(set(files))
    procs._reset_signals()
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _writer(1, line_buffering=os.isatty(1))
    sys.stderr = _writer(2, line_buffering=True, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    given = [path for path in env.get("PYTHONPATH", "").split(":") if path]
    sys.path[:] = [*([os.getcwd()] if finds_modules_here else []), *given, *_PATH]
    atexit._clear()
    tempfile.tempdir = None
    random.seed()
    np.random.seed()
    subprocess.Popen = _Forking  # type: ignore[misc]


def _writer(number: int, **how: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), **how)


def _run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a module as `python -m` does, to what its exit status would be."""
    import atexit
    import runpy
    import threading
    import traceback

    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    procs.die_with_parent(int(sys.argv[2]))
    # so that what a dead command leaves is found below us, and ended
    procs.become_subreaper()
    serve(socket.socket(fileno=int(sys.argv[1])))
