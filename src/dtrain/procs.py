"""Processes that cannot outlive their parent: fork, parent-death signal, process groups.

Linux only. Nothing here imports torch, so both planes may use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PF_EXITING = 4
_SAFE_THREADS = ("jemalloc_bg_thd",)
"""Threads of libraries with fork support: jemalloc comes with pyarrow, which pandas imports."""

DEFERRED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Stop requests that a node defers until it has agents. The processes that it forks do not."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
"""All signals that request a stop."""


def die_with_parent(parent_pid: int, sig: int = signal.SIGKILL) -> None:
    """Ask the kernel to kill this process when its parent ends, for any reason.

    Args:
        parent_pid: the pid that the caller knows as its parent's. The kernel never reports a
            parent that died before this call, so this process exits at once if the pid differs.
        sig: the signal. A process that has a handler for it must end itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(128 + signal.SIGKILL)


def outlive_parent() -> None:
    """Undo `die_with_parent`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)


def add_current_directory() -> None:
    """Let the user's code import from the current directory, from which `python -P` keeps dtrain's.

    It comes before installed packages, as usual, but after the standard library. Any user may write
    to the directory, and a `types.py` in it must not replace Python's own imports. Call it after
    dtrain's own imports.
    """
    if not sys.flags.safe_path or "PYTHONSAFEPATH" in os.environ:
        return  # it is there already, or the user does not want it
    with contextlib.suppress(FileNotFoundError):  # the directory no longer exists
        folder, standard = os.getcwd(), os.path.dirname(os.__file__)
        own = (standard, f"{standard}/lib-dynload")
        ends = [k for k, path in enumerate(sys.path) if path in own]
        if folder not in sys.path:
            sys.path.insert(1 + max(ends, default=-1), folder)


def fork_child(
    run: Callable[[], int],
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    keep_fds: Iterable[int] = (),
    block: Iterable[int] = (),
) -> int:
    """Fork a process that leads its own process group, dies with this one, and runs `run`.

    The caller must have one thread: a forked copy of a locked lock is locked for ever.

    Args:
        run: called in the child; its return value is the exit status. An exception is printed
            to the child's stderr and ends it with status 1.
        stdout: file descriptor to become the child's stdout. None keeps this process's.
        stderr: the same for stderr.
        keep_fds: descriptors above 2 that stay open in the child. All others are closed, so
            that a pipe of this process reports its end when *this process* ends and not when the
            child does.
        block: signals that wait, blocked, until `run` has handlers for them and unblocks them.

    Returns:
        The child's pid, which is also its process group id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, block)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with contextlib.suppress(OSError):  # the child calls it too, and either may be first
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(parent)
        _reset_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, (before - {*DEFERRED_SIGNALS}) | {*block})
        if stdout is not None:
            os.dup2(stdout, 1)
        if stderr is not None:
            os.dup2(stderr, 2)
        _close_all_but({0, 1, 2, *keep_fds})
        status = run()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def threads_lost_by_fork() -> int:
    """Return how many threads of this process a fork would lose, perhaps with a lock they hold."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text(encoding="utf-8", errors="replace").strip())
    return sum(name not in _SAFE_THREADS for name in names) - 1


def kill_group(pgid: int, sig: int = signal.SIGKILL) -> bool:
    """Send `sig` to every process of a group. Return False if no such process is left."""
    try:
        os.killpg(pgid, sig)
    except ProcessLookupError:
        return False
    return True


def shell_code(status: int) -> int:
    """Return an exit status as a shell reports it: 128 + N for signal N, where `Popen` has -N."""
    return status if status >= 0 else 128 - status


def become_subreaper() -> None:
    """Become the parent of all orphans below this process, so that they can be found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start_child(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path | None, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process that runs a dtrain module and ends with this one, by its flag `--parent`."""
    with open(log or os.devnull, "ab") as file:
        return subprocess.Popen(
            [*argv, "--parent", str(os.getpid())],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=pass_fds,
            start_new_session=True,  # this process forwards a Ctrl-C
        )


def ignore_stops() -> None:
    """Ignore further stop requests, because this process is exiting already."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def identity(pid: int) -> str | None:
    """Return a name for process `pid` that no later process will have; None if it has ended.

    Pids are reused, and times of day shift when a clock is set. So the name consists of the boot,
    the PID namespace, and the clock tick of the boot at which the process started.
    """
    fields = _stat(pid)
    if not fields or fields[0] in "ZX":
        return None
    try:
        return f"{_boot_and_namespace()}/{pid}/{fields[19]}"
    except OSError:
        return None


def is_visible(identity: str) -> bool:
    """Return whether an identity is of this boot and PID namespace, so its process is visible."""
    return identity.startswith(f"{_boot_and_namespace()}/")


def _boot_and_namespace() -> str:
    """Return the boot, and the PID namespace of this process: a container has its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def this_process() -> dict[str, Any]:
    """Return host, pid and identity of this process, to find out later whether it lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "identity": identity(pid)}


def is_ending(pid: int) -> bool:
    """Return whether a process is exiting or gone: a signal has no effect on it any more."""
    fields = _stat(pid)
    return not fields or bool(int(fields[6]) & _PF_EXITING)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may contain any character


def serve_under_submitit(command: list[str]) -> int:
    """Run a node's process below one of submitit's, and forward Slurm's signals to it.

    A failure ends this process at once with the node's exit code, for srun to see.

    Args:
        command: the command of the node's process.
    """
    process = subprocess.Popen([*command, "--parent", str(os.getpid())])
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _frame: process.send_signal(number))
    code = process.wait()
    if code != 0:
        os._exit(shell_code(code))
    return 0


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (*STOP_SIGNALS, signal.SIGCHLD, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _close_all_but(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)
