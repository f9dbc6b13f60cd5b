"""Errors of loader processes: the reason, with the sample and the user's line.

torch puts such an error into the message of another one. A batch that cannot be sent to another
process is lost, and torch waits for it forever. If a process has ended, torch reports no reason.
"""

from __future__ import annotations

import errno
import functools
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import tempfile
import traceback
import weakref
from dataclasses import dataclass
from typing import Any

from torch.utils.data._utils import signal_handling

from dtrain.errors import DtrainError
from dtrain.procs import die_with_parent
from dtrain.run.failures import OtherProcessError, describe_exit

_SLOT = 256
"""The number of bytes for the text of what one loader process is reading."""
_OUT_OF_MEMORY = "; if memory was short, set fewer data.workers or a smaller data.prefetch"
_LONGEST_FOLDER = 60
"""The longest directory for a socket: a path has 107 characters, and multiprocessing adds 33."""


class LoaderProcessError(DtrainError):
    """Raised when a loader process has ended unexpectedly."""

    code = "data.loader-process-ended"


class _Own:
    number = 0


@dataclass(frozen=True)
class Failed:
    error: OtherProcessError
    trace: str


class Guarded:
    """A fetcher for loader processes, whose errors are sent to the rank."""

    def __init__(self, fetcher: Any, workers: int) -> None:
        self._fetcher = fetcher
        self._doing = mmap.mmap(-1, workers * _SLOT)  # shared with processes that are forked

    def __getitems__(self, request: Any) -> Any:
        """Fetch a request; torch's DataLoader calls this with the output of its batch sampler."""
        self._record_doing(str(request))
        try:
            return self._fetcher.fetch(request)
        except BaseException as error:  # also sys.exit()
            return failed(error)
        finally:
            self._record_doing("")

    def doing(self, worker: int) -> str:
        """Return what a process was reading when it ended; empty if it was idle."""
        slot = self._doing[worker * _SLOT : (worker + 1) * _SLOT]
        return slot.rstrip(b"\0").decode(errors="replace")

    def _record_doing(self, text: str) -> None:
        start = _Own.number * _SLOT
        self._doing[start : start + _SLOT] = text.encode()[:_SLOT].ljust(_SLOT, b"\0")


def failed(error: BaseException) -> Failed:
    if isinstance(error, SystemExit):
        error.args = (f"sys.exit({error.code!r}) was called in a loader process",)
    _advise(error)
    return Failed(OtherProcessError.of(error), "".join(traceback.format_exception(error)))


def _advise(error: BaseException) -> None:
    if os.strerror(errno.EMFILE) in str(error):  # torch raises a RuntimeError with it
        error.add_note("allow more open files (ulimit -n), or set fewer data.workers")


def handed_on(made: Any) -> Any:
    """Return the batch that a loader process made.

    Raises:
        OtherProcessError: the loader process failed.
    """
    if isinstance(made, Failed):
        raise made.error from _Trace(made.trace)
    return made


class _Trace(Exception):
    """The traceback of another process, used as a cause for the log."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def begin(parent_pid: int, worker: int) -> None:
    """Prepare a loader process: it dies with the rank, ignores signals and reports errors.

    A preemption signal often reaches every process of a job. If loader processes obeyed it, the
    rank would lose its batches before the checkpoint that the signal requests.
    """
    die_with_parent(parent_pid)
    _Own.number = worker
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # multiprocessing's own hook only prints the error, and the rank waits forever
    multiprocessing.queues.Queue._on_queue_feeder_error = _unsent  # type: ignore[attr-defined]


def _unsent(queue: Any, error: Exception, item: Any) -> None:
    """Send the reason instead of a batch that cannot be sent."""
    index, _ = item
    error.add_note("a loader process could not send a batch to its rank")
    queue.put((index, failed(error)))


def raise_only_where_waited() -> None:
    """Keep torch from raising anywhere in the rank when a loader process has ended.

    The error is raised where the rank waits for a batch, at once or at torch's next check, up to
    5 s later.
    """
    signal_handling._SIGCHLD_handler_set = True


def make_room_for_sockets() -> None:
    """Give loader processes a short directory for sockets if the path of TMPDIR is too long."""
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") or len(tempfile.gettempdir()) <= _LONGEST_FOLDER:
        return
    config["tempdir"] = tempfile.mkdtemp(prefix="dtrain-", dir="/tmp")
    pid = os.getpid()
    multiprocessing.util.Finalize(None, _remove, args=(config["tempdir"], pid), exitpriority=-100)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def end_with_rank() -> None:
    """Kill loader processes when this process ends; it would wait, as they ignore SIGTERM."""
    # after those of a multiprocessing.Pool (15), which ends its processes itself
    multiprocessing.util.Finalize(None, _kill_all, args=(os.getpid(),), exitpriority=0)


def _kill_all(owner: int) -> None:
    if os.getpid() == owner:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


class Watched:
    """The loader processes of one iteration, watched for unexpected ends."""

    def __init__(self, guarded: Guarded, processes: list[Any]) -> None:
        self._guarded = guarded
        self.processes = processes
        _WATCHED.add(self)

    def lost(self) -> str | None:
        """Describe a process that has ended unexpectedly; None if all are running."""
        for worker, process in enumerate(self.processes):
            if not multiprocessing.connection.wait([process.sentinel], 0):
                continue
            process.join(1)
            status, doing = process.exitcode, self._guarded.doing(worker)
            if status is not None and (status != 0 or doing):
                when = f"while it read {doing}" if doing else "while it waited for work"
                advice = _OUT_OF_MEMORY if status == -signal.SIGKILL else ""
                return f"loader process {worker} {describe_exit(status)} {when}{advice}"
        return None


_WATCHED: weakref.WeakSet[Watched] = weakref.WeakSet()

_LOST_CONNECTION = (EOFError, ConnectionError, FileNotFoundError)
"""The errors of opening the connections and files of a process that has ended."""


def explained(error: BaseException) -> BaseException | None:
    """Return a better error if a lost loader process has caused this one, else None.

    torch raises such an error where the rank waits for a batch.
    """
    _advise(error)
    if isinstance(error, OtherProcessError):
        return None
    watched = list(_WATCHED)
    if isinstance(error, _LOST_CONNECTION):  # the process may still be ending
        multiprocessing.connection.wait([p.sentinel for w in watched for p in w.processes], 1)
    lost = next((text for text in (each.lost() for each in watched) if text), None)
    return None if lost is None else LoaderProcessError(lost)
