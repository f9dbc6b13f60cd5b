"""The attempts of a run: the driver of each one, and its result.

The process that makes an attempt first claims its number, with a file that only one process can
make. The next number is free once the previous attempt has ended, so two attempts never train in
one run directory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dtrain import procs
from dtrain.errors import DamagedError, UsageError
from dtrain.plainjson import to_json
from dtrain.run import files
from dtrain.run.rundir import RunDir
from dtrain.waiting import repeating

State = Literal["running", "succeeded", "failed", "cancelled", "lost", "prepared"]
"""`lost` means that the driver of the run died before it could write the result."""
DAMAGED = "damaged"
"""The state of a run whose directory cannot be read."""

TOKEN_BYTES = 32
HEARTBEAT_S = 20.0
"""The interval at which the driver of a run sends a heartbeat."""
SILENT_S = 120.0
"""The time without a heartbeat after which a driver whose process cannot be seen counts as dead."""


class Held(UsageError):
    """Another command or job drives the run, or has already made the attempt."""

    code = "run.held"

    def __init__(self, run: RunDir, holder: Handle | None) -> None:
        """Keep the holder's handle. None means that the workers were started by hand."""
        who = "workers that were started by hand" if holder is None else str(holder)
        text = f"run {run.id} is held by {who}; `dtrain cancel {run.id}` ends it"
        if holder is not None and Result.read(run, holder.attempt) is not None:
            text = f"run {run.id} was held by {who}, which has ended meanwhile; try again"
        super().__init__(text)


@dataclass(frozen=True)
class Handle:
    """The driver of an attempt, as handle.json records it."""

    launcher: str
    attempt: int
    first: int
    """The first attempt of the same command or job. A job makes further attempts automatically."""
    host: str
    pid: int
    identity: str | None
    """The identity of the process, see `procs.identity`. A pid alone may have been reused."""
    started: float
    job_id: str | None = None
    """The batch job that continues without this process."""

    @classmethod
    def of_this_process(cls, launcher: str, attempt: int) -> Handle:
        """Return a handle that names this process as the driver."""
        return cls(launcher, attempt, attempt, started=time.time(), **procs.this_process())

    @classmethod
    def read(cls, run: RunDir, attempt: int | None = None) -> Handle | None:
        """Return the handle of an attempt, by default the newest.

        None when no command has begun one.
        """
        numbers = reversed(run.attempts()) if attempt is None else [attempt]
        found = (cls._read(run.handle(number), number) for number in numbers)
        return next((each for each in found if each is not None), None)

    @classmethod
    def _read(cls, path: Path, attempt: int) -> Handle | None:
        handle = files.read_as(cls, path)
        if handle is not None and not handle.first <= handle.attempt == attempt:
            raise DamagedError(str(path), f"it is of attempt {handle.attempt}")
        return handle

    def __str__(self) -> str:
        since = files.local_time(self.started)
        who = f"process {self.pid} on {self.host}" if self.job_id is None else f"job {self.job_id}"
        return f"{who}, which has driven attempt {self.attempt} since {since}"

    def write(self, run: RunDir) -> None:
        """Overwrite the handle. Only the process that has claimed the attempt may do this."""
        files.make_parent(run.handle(self.attempt))
        files.write_atomic(run.handle(self.attempt), self._text())

    def _text(self) -> str:
        return to_json(asdict(self), indent=2) + "\n"

    def claim(self, run: RunDir) -> None:
        """Claim the attempt, which follows the newest one.

        Raises:
            Held: another process has claimed it, or a later one.
        """
        newest = Handle.read(run)
        is_next = newest is None or newest.attempt + 1 == self.attempt
        if not is_next or not files.create_exclusive(run.handle(self.attempt), self._text()):
            raise Held(run, Handle.read(run))

    def claim_node(self, run: RunDir, node_rank: int) -> None:
        """Claim one node of an attempt that node 0's command drives.

        A node whose command has ended may be started again. It joins the next round.

        Raises:
            Held: another command has claimed the node.
        """
        folder = run.node(self.attempt, node_rank)
        numbers = (path.stem.removeprefix("handle-") for path in folder.glob("handle-*.json"))
        number = max((int(text) + 1 for text in numbers if text.isdecimal()), default=0)
        holder = Handle._read(folder / f"handle-{number - 1}.json", self.attempt)
        free = holder is None or not holder.is_alive(run)
        if not free or not files.create_exclusive(folder / f"handle-{number}.json", self._text()):
            raise Held(run, holder)

    @property
    def is_visible(self) -> bool:
        """Return whether its process is visible here: it has the same boot and PID namespace."""
        return self.identity is not None and procs.is_visible(self.identity)

    def is_alive(self, run: RunDir) -> bool:
        """Return whether the driver runs. If it cannot be seen, a recent heartbeat decides."""
        if self.identity is None:
            return False
        if self.is_visible:
            return procs.identity(self.pid) == self.identity
        return not is_silent(run, self.attempt)


def claim_for_job(run: RunDir, attempt: int, job_id: str) -> None:
    """Claim a batch job's attempt when it begins: the submitted one, or one after a requeue.

    Raises:
        Held: the run was resumed meanwhile, and another process drives it.
    """
    newest = Handle.read(run)
    if newest is None or newest.job_id not in (None, job_id):
        raise Held(run, newest)
    if newest.job_id is None:  # the submitting process has not written it yet, or was killed
        replace(newest, job_id=job_id).write(run)
    for number in range(newest.attempt + 1, attempt + 1):  # none is left for another process
        replace(newest, attempt=number, job_id=job_id, started=time.time()).claim(run)


def newest_of(run: RunDir, first: int) -> int:
    """Return the newest attempt of the command or job that began with attempt `first`."""
    handles = (Handle.read(run, number) for number in run.attempts() if number >= first)
    return max((each.attempt for each in handles if each and each.first == first), default=first)


@contextlib.contextmanager
def sending_heartbeats(run: RunDir, attempt: int) -> Iterator[None]:
    """Show hosts on the same disk, within the `with` block, that an attempt's driver is alive."""

    def touch() -> None:
        with contextlib.suppress(OSError):
            os.utime(run.handle(attempt))

    # at a URL, the mirror sends the heartbeat
    with contextlib.nullcontext() if run.url is not None else repeating(touch, HEARTBEAT_S):
        yield


def is_silent(run: RunDir, attempt: int) -> bool:
    """Return whether an attempt has been silent for so long that no process drives it.

    On a shared disk, the driver's heartbeat, the events and the metrics all count as signs of life.
    At a URL, the driver's heartbeat there counts.
    """
    if run.url is not None:
        newest = files.read_as(dict[str, float], run.heartbeat)
        return newest is not None and time.time() - newest.get("time", 0.0) > SILENT_S
    times = [_changed(path) for path in (run.handle(attempt), run.events, run.metrics)]
    return bool(times[0]) and _now(run) - max(times) > SILENT_S


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _now(run: RunDir) -> float:
    """Return the time by the clock of the disk's server, which sets the times of files."""
    try:
        with tempfile.TemporaryFile(dir=run.path) as file:
            file.write(b"x")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # a run of another user
        return time.time()


def token(run: RunDir, attempt: int) -> bytes:
    """Return the secret by which the agents of an attempt recognize one another.

    See `node.sealed`. The first host that needs it makes it. It is worthless once the attempt has
    ended: the next attempt has another secret.

    Raises:
        OSError: it can be neither read nor written.
    """
    path = run.token(attempt)
    if not path.exists():
        files.create_exclusive(path, secrets.token_hex(TOKEN_BYTES), mode=0o600)
    try:
        found = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        found = b""
    if len(found) != TOKEN_BYTES:
        raise OSError(0, "is damaged", str(path))
    return found


@dataclass(frozen=True)
class Result:
    """The result of an attempt, as result.json records it."""

    state: State
    exit_code: int
    started: float
    ended: float

    def write(self, run: RunDir, attempt: int) -> bool:
        """Write result.json, unless it already has a result. Return whether it was written.

        The driver and any process that looks at the run may both detect the end. Only a process
        that did not see the end can have written "lost", so that result is replaced.
        """
        known = Result.read(run, attempt)
        if known is not None and known.state != "lost":
            return False
        files.write_json(run.result(attempt), asdict(self))
        return True

    @classmethod
    def read(cls, run: RunDir, attempt: int) -> Result | None:
        """Return the attempt's result. None while it runs, or when its driver was killed."""
        return files.read_as(cls, run.result(attempt))
