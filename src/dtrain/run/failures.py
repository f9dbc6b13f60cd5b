"""Failure records: one small JSON file for each worker or node that fails, written on the spot."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from dtrain import checked
from dtrain.checked import ExitCode, Name, Rank, Text, Time, Whole
from dtrain.errors import DamagedError, DtrainError, without_code
from dtrain.plainjson import to_json
from dtrain.procs import shell_code
from dtrain.run import files
from dtrain.run.rundir import RunDir

Kind = Literal[
    "exception",
    "exit",
    "signal",
    "oom",
    "node_missing",
    "node_lost",
    "agent",
    "collectives",  # not the others'
    "parted",  # likewise, but no majority says who is right
    "absent",  # it still ran when the others had given up waiting
    "timeout",  # all waited for one another
    "left",  # with status 0, before the end
]

KIND_CODES: Mapping[Kind, str] = {
    "exception": "failure.exception",
    "exit": "failure.exit",
    "signal": "failure.signal",
    "oom": "failure.out-of-memory",
    "node_missing": "failure.node-missing",
    "node_lost": "failure.node-lost",
    "agent": "failure.agent",
    "collectives": "failure.collectives-differ",
    "parted": "failure.ranks-parted",
    "absent": "failure.rank-absent",
    "timeout": "failure.timeout",
    "left": "failure.rank-left",
}
"""The code of a failure, where no error of dtrain has one of its own."""

# Lines around a traceback in a rank's log: a console leaves out what the verdict will say.
FAILURE_OPEN = "dtrain: this rank has failed:"
FAILURE_CLOSE = "dtrain: end of the failure"

# What a rank says when it is another one that went away. Texts of gloo, NCCL, c10d and TCPStore.
_COLLATERAL = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|socket timeout"
    r"|timed out waiting|wait timeout|application timeout caused pair closure|remote process"
    r"|nccl.*(remote error|abort)|connectfullmesh|peer has gone|unexpected eof|recvvalue|recvvector"
    r"|store.*(timeout|closed)",
    re.IGNORECASE,
)

_TIMEOUT = re.compile(
    r"timed out|(wait|socket|operation) timeout|application timeout caused pair closure",
    re.IGNORECASE,
)

_MAX_MESSAGE = 4000
_STEP = "dtrain_step"
"""Attribute of an exception."""
_OUR_OWN = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class Frame:
    __pydantic_config__ = checked.CONFIG

    file: Text
    line: Whole
    function: Text
    code: Text


class OtherProcessError(Exception):
    """An error of a process that works for a rank, told as if it were the rank's own.

    Args:
        message: its text and its notes.
        type: the name of its class.
        frames: as of `user_frames`.
        code: of an error of dtrain.
    """

    def __init__(self, message: str, type: str, frames: list[Frame], code: str = "") -> None:
        super().__init__(message)
        self.type = type
        self.frames = frames
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return OtherProcessError, (str(self), self.type, self.frames, self.code)

    @classmethod
    def of(cls, error: BaseException) -> OtherProcessError:
        """What there is to say of an error in this process."""
        return cls(_text(error), type(error).__name__, _frames(error), _code(error))


@dataclass(frozen=True)
class FailureRecord:
    """Why one worker, or one node, failed."""

    __pydantic_config__ = checked.CONFIG

    kind: Kind
    message: Text
    exit_code: ExitCode
    """As a shell reports it: 128 + N for signal N."""
    node_rank: Rank
    node: Name
    """The node's name."""
    rank: Rank | None = None
    """None when a whole node failed."""
    restart: Whole = 0
    time: Time = 0.0
    """Seconds since the epoch, of the failing host's clock."""
    pid: Whole | None = None
    type: Text = ""
    """Name of the exception's class."""
    frames: list[Frame] = field(default_factory=list)
    """The traceback cut to the user's own lines, outermost first."""
    traceback: Text = ""
    """The whole traceback."""
    log: Text = ""
    """Path of the log that has more."""
    collateral: bool = False
    """Whether the process itself knew that another rank was to blame."""
    step: Whole | None = None
    """The optimizer step that it failed in, 0 before the first; None where another try of the same
    may end otherwise, or where steps are not known."""
    repeated: bool = False
    """Whether the restart before had failed in just this way."""
    hint: Text = ""
    """What to do about it, where that depends on where the process stood."""
    code: Text = ""
    """Stable name of the error; when it is left out, that of the kind."""

    def __post_init__(self) -> None:
        if not self.code:
            object.__setattr__(self, "code", KIND_CODES[self.kind])

    def repeats(self, before: FailureRecord) -> bool:
        """Whether it is the same error at the same line of the same step."""
        ours, theirs = (
            (each.step, each.type, each.message, each.frames) for each in (self, before)
        )
        return self.step is not None and ours == theirs

    @classmethod
    def read(cls, path: Path) -> FailureRecord | None:
        """The record in a file; None when there is none, or the file holds something else."""
        try:
            return files.read_as(cls, path)
        except (DamagedError, OSError):
            return None

    def write(self, run: RunDir, attempt: int) -> None:
        """Write the record to its place in the run directory, or where that is full, aside."""
        path = (
            run.node_failure(attempt, self.node_rank)
            if self.rank is None
            else run.failure(attempt, self.rank)
        )
        try:
            files.write_json(path, asdict(self))
        except OSError as error:
            with contextlib.suppress(OSError):
                files.write_json(_made_aside(run, attempt) / path.name, asdict(self))
            with contextlib.suppress(OSError):  # stderr is a file on the same disk
                print(f"dtrain: cannot write {path}: {error.strerror}", file=sys.stderr)


def read_all(run: RunDir, attempt: int, rank: int | None = None) -> list[FailureRecord]:
    """Every failure record of an attempt, or of one rank in it."""
    folders = (run.failures(attempt), _aside(run, attempt))
    name = "*.json" if rank is None else run.failure(attempt, rank).name
    paths = [path for folder in folders if folder for path in sorted(folder.glob(name))]
    records = [FailureRecord.read(path) for path in paths]
    return [record for record in records if record is not None]


# -- where records go when the run directory's disk is full, the likeliest cause -----------------


def _aside(run: RunDir, attempt: int) -> Path | None:
    """The folder of an attempt on this host; None where there is none of our own.

    Any account may make one of that name: what another can write to is not believed.
    """
    path = _path_aside(run, attempt)
    try:
        found = path.lstat()
    except OSError:
        return None
    others_can = found.st_mode & 0o077
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_can
    return path if is_ours else None


def _made_aside(run: RunDir, attempt: int) -> Path:
    path = _path_aside(run, attempt)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _aside(run, attempt) is None:
        raise PermissionError(f"{path} is not ours")
    return path


def remove_aside(run: RunDir, attempt: int) -> None:
    """Remove what this host has kept of an attempt's records outside its run directory."""
    found = _aside(run, attempt)
    if found is not None:
        shutil.rmtree(found, ignore_errors=True)


def _path_aside(run: RunDir, attempt: int) -> Path:
    place = blake2b(os.path.realpath(run.attempt(attempt)).encode(), digest_size=16)
    return Path(tempfile.gettempdir()) / f"dtrain-failures-{os.getuid()}-{place.hexdigest()}"


# -- making records ------------------------------------------------------------------------------


def of_node(
    message: str,
    *,
    kind: Kind = "agent",
    exit_code: int = 1,
    node_rank: int = 0,
    node: str | None = None,
    log: Path | str = "",
    **place: Any,
) -> FailureRecord:
    """The record of a node that fails now, of this one unless `node` is the name of another.

    `place` has further fields of the record: `restart`, `pid`, `code`.
    """
    name = node_name() if node is None else node
    message, code = without_code(message)  # it may end with what a process of the node printed
    place = {"time": time.time(), "log": str(log), "code": code, **place}
    return FailureRecord(kind, message, exit_code, node_rank, name, **place)


def record_node(
    run: RunDir, attempt: int, message: str, *, restart: int | None = None, **fields: Any
) -> FailureRecord:
    """Write the record of a node.

    Args:
        run: the run.
        attempt: its attempt.
        message: why the node failed.
        restart: None: the newest of which there is a record, so that this counts beside them.
        **fields: as of `of_node`.
    """
    if restart is None:
        restart = max((known.restart for known in read_all(run, attempt)), default=0)
    made = of_node(message, restart=restart, **fields)
    made.write(run, attempt)
    return made


def of_worker(kind: Kind, message: str, exit_code: int, **place: Any) -> FailureRecord:
    """The record of a worker: of this process, which fails now, unless `place` says another."""
    here = {"node": node_name(), "time": time.time(), "pid": os.getpid()}
    return FailureRecord(kind, message, exit_code, **{**here, **place})


def with_log_in(run: RunDir, data: bytes) -> bytes:
    """The text of a record that was written in another copy of the run, with its log in this."""
    try:
        record = checked.read(FailureRecord, data)
    except ValueError:
        return data  # and nobody will take it for one
    inside = record.log.partition(f"/{run.id}/")[2]
    log = str(run.path / inside) if inside else record.log
    return to_json(asdict(replace(record, log=log)), indent=2).encode()


def of_exception(
    error: BaseException, *, rank: int, node_rank: int, restart: int, log: str
) -> FailureRecord:
    """The record of an exception that ended this worker."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        kind: Kind = "exit"
        message = f"sys.exit({error.code!r})"
    else:
        code, kind = 1, "exception"
        message = _text(error)
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]}\n(the log has all of it, {len(message):,} characters)"
    return of_worker(
        kind,
        message,
        code,
        node_rank=node_rank,
        rank=rank,
        restart=restart,
        type=error.type if isinstance(error, OtherProcessError) else type(error).__name__,
        frames=_frames(error),
        traceback="".join(traceback.format_exception(error))[: checked.MOST],
        log=log,
        collateral=getattr(error, "collateral", False),
        step=None if _may_pass(error) else getattr(error, _STEP, None),
        code=_code(error),
    )


def in_step(error: BaseException, step: int) -> None:
    """Note on an exception in which optimizer step it was raised, unless that is there already."""
    if not hasattr(error, _STEP):
        setattr(error, _STEP, step)


def _may_pass(error: BaseException) -> bool:
    """Whether another try of the same may end otherwise: files, networks, devices, other ranks."""
    return (
        isinstance(error, OSError)
        or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError", "LoaderProcessError")
        or is_collateral(str(error))
    )


def _text(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, DtrainError | OtherProcessError) else ""


def _frames(error: BaseException) -> list[Frame]:
    if isinstance(error, OtherProcessError):
        return error.frames
    return user_frames(error.__traceback__, blank=isinstance(error, DtrainError))


def of_exit_status(status: int, *, out_of_memory: bool, **place: Any) -> FailureRecord:
    """The record of a worker that ended without a word: a signal, or `os._exit`.

    Args:
        status: as `os.waitstatus_to_exitcode` gives it: negative for a signal.
        out_of_memory: whether the kernel killed for want of memory meanwhile.
        **place: `rank`, `node_rank`, `node`, `restart`, `time`, `pid`, `log`.
    """
    if status >= 0:
        return of_worker("exit", f"exited with code {status}", status, **place)
    name = signal_name(-status)
    if -status == signal.SIGKILL and out_of_memory:
        message = "killed by the kernel: out of memory"
        return of_worker("oom", message, shell_code(status), **place)
    return of_worker("signal", f"killed by {name}", shell_code(status), **place)


def user_frames(trace: TracebackType | None, *, blank: bool = False) -> list[Frame]:
    """A traceback cut to the user's own lines: not dtrain's, the standard library's, packages'.

    Where nothing is left (the error is in a library called by dtrain), the innermost frame is,
    unless that is allowed to be `blank`.
    """
    frames = [
        Frame(entry.filename, entry.lineno or 0, entry.name, (entry.line or "").strip())
        for entry in traceback.extract_tb(trace)
    ]
    return users_own(frames) or ([] if blank else frames[-1:])


def users_own(frames: list[Frame]) -> list[Frame]:
    """Those of some calls that are the user's own."""
    return [frame for frame in frames if _is_users(frame.file)]


def node_name() -> str:
    """This node's name: what the launcher calls it, or the host name."""
    return os.environ.get("DTRAIN_NODE_NAME") or socket.gethostname()


def is_collateral(message: str) -> bool:
    """Whether an error only says that another rank went away."""
    return _COLLATERAL.search(message[: checked.MOST]) is not None


def is_timeout(message: str) -> bool:
    """Whether an error says that another rank did not come in time."""
    return is_collateral(message) and _TIMEOUT.search(message) is not None


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def how_it_ended(status: int) -> str:
    """`was killed by SIGKILL` or `ended with code 3`, of a status that is negative for signals."""
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with code {status}"


def _is_users(file: str) -> bool:
    if file.startswith("<") or file.startswith(_OUR_OWN):
        return False
    paths = sysconfig.get_paths()
    return not any(file.startswith(paths[kind]) for kind in ("stdlib", "purelib", "platlib"))
