"""What becomes of a loader process that fails: a reason, with the sample and the user's line.

torch prints such an error into another one's message, loses what cannot be sent from one process to
another (and waits for it for ever), and knows of a process that is gone only that it is.
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
from dtrain.run.failures import OtherProcessError, how_it_ended

_SLOT = 256
"""Bytes for what one loader process is doing, in words."""
_OUT_OF_MEMORY = "; where memory was short, ask for fewer data.workers or less data.prefetch"
_LONGEST_FOLDER = 60
"""A socket's path has 107 characters, 33 of which multiprocessing adds to the folder."""


class LoaderProcessError(DtrainError):
    """A loader process is gone."""

    code = "data.loader-process-ended"


class _Own:
    number = 0


@dataclass(frozen=True)
class Failed:
    error: OtherProcessError
    trace: str


class Guarded:
    """A fetcher whose errors are sent to the rank, for loader processes."""

    def __init__(self, fetcher: Any, workers: int) -> None:
        self._fetcher = fetcher
        self._doing = mmap.mmap(-1, workers * _SLOT)  # shared with processes that are forked

    def __getitems__(self, request: Any) -> Any:
        """torch's DataLoader asks in this way for what its batch sampler gave."""
        self._does(str(request))
        try:
            return self._fetcher.fetch(request)
        except BaseException as error:  # also sys.exit()
            return failed(error)
        finally:
            self._does("")

    def doing(self, worker: int) -> str:
        """What a process was doing when it ended; empty when it had nothing to do."""
        slot = self._doing[worker * _SLOT : (worker + 1) * _SLOT]
        return slot.rstrip(b"\0").decode(errors="replace")

    def _does(self, text: str) -> None:
        start = _Own.number * _SLOT
        self._doing[start : start + _SLOT] = text.encode()[:_SLOT].ljust(_SLOT, b"\0")


def failed(error: BaseException) -> Failed:
    if isinstance(error, SystemExit):
        error.args = (f"sys.exit({error.code!r}) was called in a loader process",)
    _advise(error)
    return Failed(OtherProcessError.of(error), "".join(traceback.format_exception(error)))


def _advise(error: BaseException) -> None:
    if os.strerror(errno.EMFILE) in str(error):  # torch raises a RuntimeError with it
        error.add_note("allow more open files (ulimit -n), or ask for fewer data.workers")


def handed_on(made: Any) -> Any:
    """What a loader process made.

    Raises:
        OtherProcessError: it failed instead.
    """
    if isinstance(made, Failed):
        raise made.error from _Trace(made.trace)
    return made


class _Trace(Exception):
    """The traceback of another process, as a cause, for the log."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def begin(parent_pid: int, worker: int) -> None:
    """What a loader process does first: die with the rank, leave signals to it, and tell errors.

    A preemption signal often reaches every process of a job. Were loaders to obey it, the rank
    would lose its batches before the checkpoint that the signal asks for.
    """
    die_with_parent(parent_pid)
    _Own.number = worker
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # the hook that multiprocessing has for it prints the error, and the rank waits for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = _unsent  # type: ignore[attr-defined]


def _unsent(queue: Any, error: Exception, item: Any) -> None:
    """Send the reason instead of a batch that cannot be sent."""
    index, _ = item
    error.add_note("a loader process could not send a batch to its rank")
    queue.put((index, failed(error)))


def raise_only_where_waited() -> None:
    """Keep torch from raising, wherever the rank is, when a loader process is gone.

    It is told where the rank waits for a batch, at once or after torch's next look, 5 s later.
    """
    signal_handling._SIGCHLD_handler_set = True


def make_room_for_sockets() -> None:
    """Give loader processes a short folder for their sockets, where TMPDIR is too long for one."""
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
    """Let this process's end not wait for loader processes, which do not heed its SIGTERM."""
    # after those of a multiprocessing.Pool (15), which ends its processes by itself
    multiprocessing.util.Finalize(None, _kill_all, args=(os.getpid(),), exitpriority=0)


def _kill_all(owner: int) -> None:
    if os.getpid() == owner:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()


class Watched:
    def __init__(self, guarded: Guarded, processes: list[Any]) -> None:
        self._guarded = guarded
        self.processes = processes
        _WATCHED.add(self)

    def lost(self) -> str | None:
        """Which process has ended by itself, and what it was doing; None when all are there."""
        for worker, process in enumerate(self.processes):
            if not multiprocessing.connection.wait([process.sentinel], 0):
                continue
            process.join(1)
            status, doing = process.exitcode, self._guarded.doing(worker)
            if status is not None and (status != 0 or doing):
                place = f"while it read {doing}" if doing else "while it waited for work"
                advice = _OUT_OF_MEMORY if status == -signal.SIGKILL else ""
                return f"loader process {worker} {how_it_ended(status)} {place}{advice}"
        return None


_WATCHED: weakref.WeakSet[Watched] = weakref.WeakSet()

_OF_LOST = (EOFError, ConnectionError, FileNotFoundError)
"""What comes of opening what a lost process has left."""


def explained(error: BaseException) -> BaseException | None:
    """What to say instead of an error that a lost loader process has caused; None where none has.

    torch raises one where the rank waits for a batch.
    """
    _advise(error)
    if isinstance(error, OtherProcessError):
        return None
    watched = list(_WATCHED)
    if isinstance(error, _OF_LOST):  # it may still be about to end
        multiprocessing.connection.wait([p.sentinel for w in watched for p in w.processes], 1)
    lost = next((text for text in (each.lost() for each in watched) if text), None)
    return None if lost is None else LoaderProcessError(lost)
