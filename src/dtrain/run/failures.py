"""Failure records: one small JSON file for each worker or node that fails, written at once."""

from __future__ import annotations

import contextlib
import json
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
from collections.abc import Iterable, Mapping
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
    "collectives",  # different from those of the other ranks
    "undecided",  # the same, but no majority shows which rank is right
    "absent",  # it still ran when the others had stopped waiting
    "timeout",  # all ranks waited for one another
    "early_exit",  # with status 0, before the end
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
    "undecided": "failure.collectives-undecided",
    "absent": "failure.rank-absent",
    "timeout": "failure.timeout",
    "early_exit": "failure.early-exit",
}
"""The code of a failure whose error has no code of its own in dtrain."""

# Lines around a traceback in a rank's log: a console omits what the verdict will contain.
FAILURE_OPEN = "dtrain: this rank has failed:"
FAILURE_CLOSE = "dtrain: end of the failure"

# Errors of a rank that lost another rank. Texts of gloo, NCCL, c10d and TCPStore.
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

_TRACE_LINE = re.compile(
    r'^ *File "(?P<file>.+)", line (?P<line>\d{1,9}), in (?P<function>.+)'
    r"(?:\n {4}(?P<code>\S.*))?$",
    re.MULTILINE,
)

_MAX_MESSAGE = 4000
_STEP = "dtrain_step"
"""The attribute of an exception that holds its step."""
_PACKAGE_DIR = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class Frame:
    __pydantic_config__ = checked.CONFIG

    file: Text
    line: Whole
    function: Text
    code: Text


class OtherProcessError(Exception):
    """An error of a process that works for a rank, reported as if it were the rank's own.

    Args:
        message: its text and its notes.
        type: the name of its class.
        frames: its frames, as `user_frames` returns them.
        code: the code of an error of dtrain.
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
        """Return a description of an error in this process."""
        return cls(_text(error), type(error).__name__, _frames(error), _code(error))


@dataclass(frozen=True)
class FailureRecord:
    """The reason why one worker, or one node, failed."""

    __pydantic_config__ = checked.CONFIG

    kind: Kind
    message: Text
    exit_code: ExitCode
    """The exit code as a shell reports it: 128 + N for signal N."""
    node_rank: Rank
    node: Name
    """The node's name."""
    rank: Rank | None = None
    """None when a whole node failed."""
    restart: Whole = 0
    time: Time = 0.0
    """Seconds since the epoch, by the failing host's clock."""
    pid: Whole | None = None
    type: Text = ""
    """The name of the exception's class."""
    frames: list[Frame] = field(default_factory=list)
    """The traceback cut to the user's own lines, outermost first."""
    traceback: Text = ""
    """The whole traceback."""
    log: Text = ""
    """The path of the log that has more."""
    collateral: bool = False
    """True when the process itself knew that another rank was the cause."""
    step: Whole | None = None
    """The optimizer step in which it failed, 0 before the first. None where a retry may end
    differently, or where steps are not known."""
    repeated: bool = False
    """True when the previous restart had failed in the same way."""
    hint: Text = ""
    """A remedy that depends on what the process was doing."""
    code: Text = ""
    """The stable name of the error. By default it is that of the kind."""

    def __post_init__(self) -> None:
        if not self.code:
            object.__setattr__(self, "code", KIND_CODES[self.kind])

    def repeats(self, before: FailureRecord) -> bool:
        """Return whether it is the same error at the same line of the same step."""
        this, previous = (
            (each.step, each.type, each.message, each.frames) for each in (self, before)
        )
        return self.step is not None and this == previous

    @classmethod
    def read(cls, path: Path) -> FailureRecord | None:
        """Return the record in a file. None when there is no file, or it holds something else."""
        try:
            return files.read_as(cls, path)
        except (DamagedError, OSError):
            return None

    def write(self, run: RunDir, attempt: int) -> None:
        """Write the record to the run directory, or to a directory here if its disk is full."""
        path = (
            run.node_failure(attempt, self.node_rank)
            if self.rank is None
            else run.failure(attempt, self.rank)
        )
        try:
            files.write_json(path, asdict(self))
        except OSError as error:
            with contextlib.suppress(OSError):
                files.write_json(_make_fallback_dir(run, attempt) / path.name, asdict(self))
            with contextlib.suppress(OSError):  # stderr is a file on the same disk
                print(f"dtrain: cannot write {path}: {error.strerror}", file=sys.stderr)


def read_all(run: RunDir, attempt: int, rank: int | None = None) -> list[FailureRecord]:
    """Return every failure record of an attempt, or of one rank in it."""
    folders = (run.failures(attempt), _fallback_dir(run, attempt))
    name = "*.json" if rank is None else run.failure(attempt, rank).name
    paths = [path for folder in folders if folder for path in sorted(folder.glob(name))]
    records = [FailureRecord.read(path) for path in paths]
    return [record for record in records if record is not None]


# -- where records go when the run directory's disk is full, the most likely cause ------------


def _fallback_dir(run: RunDir, attempt: int) -> Path | None:
    """Return this host's directory of an attempt. None where this account has none.

    Any account may make a directory of that name, so one that others can write to is ignored.
    """
    path = _fallback_path(run, attempt)
    try:
        found = path.lstat()
    except OSError:
        return None
    is_private = found.st_uid == os.getuid() and not found.st_mode & 0o077
    return path if stat.S_ISDIR(found.st_mode) and is_private else None


def _make_fallback_dir(run: RunDir, attempt: int) -> Path:
    path = _fallback_path(run, attempt)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _fallback_dir(run, attempt) is None:
        raise PermissionError(f"{path} belongs to another user")
    return path


def remove_fallback_dir(run: RunDir, attempt: int) -> None:
    """Remove the records of an attempt that this host has kept outside the run directory."""
    found = _fallback_dir(run, attempt)
    if found is not None:
        shutil.rmtree(found, ignore_errors=True)


def _fallback_path(run: RunDir, attempt: int) -> Path:
    key = blake2b(os.path.realpath(run.attempt(attempt)).encode(), digest_size=16)
    return Path(tempfile.gettempdir()) / f"dtrain-failures-{os.getuid()}-{key.hexdigest()}"


# -- making records ------------------------------------------------------------------------------


def of_node(
    message: str,
    *,
    kind: Kind = "agent",
    exit_code: int = 1,
    node_rank: int = 0,
    node: str | None = None,
    log: Path | str = "",
    **fields: Any,
) -> FailureRecord:
    """Return the record of a node that fails now: this node, unless `node` names another.

    `fields` has further fields of the record: `restart`, `pid`, `code`.
    """
    name = node_name() if node is None else node
    message, code = without_code(message)  # it may end with output of a process of the node
    fields = {"time": time.time(), "log": str(log), "code": code, **fields}
    return FailureRecord(kind, message, exit_code, node_rank, name, **fields)


def record_node(
    run: RunDir, attempt: int, message: str, *, restart: int | None = None, **fields: Any
) -> FailureRecord:
    """Write the record of a node.

    Args:
        run: the run.
        attempt: its attempt.
        message: the reason why the node failed.
        restart: the restart. None means the newest that has a record, so that both count.
        **fields: further fields, as in `of_node`.
    """
    if restart is None:
        restart = max((known.restart for known in read_all(run, attempt)), default=0)
    record = of_node(message, restart=restart, **fields)
    record.write(run, attempt)
    return record


def of_worker(kind: Kind, message: str, exit_code: int, **fields: Any) -> FailureRecord:
    """Return the record of a worker: this process, unless `fields` name another."""
    own = {"node": node_name(), "time": time.time(), "pid": os.getpid()}
    return FailureRecord(kind, message, exit_code, **{**own, **fields})


def with_log_in(run: RunDir, data: bytes) -> bytes:
    """Return the text of a record written in another copy of the run, with its log in this one."""
    try:
        record = checked.read(FailureRecord, data)
    except ValueError:
        return data  # no reader accepts it as one
    inside = record.log.partition(f"/{run.id}/")[2]
    log = str(run.path / inside) if inside else record.log
    return to_json(asdict(replace(record, log=log)), indent=2).encode()


def of_exception(
    error: BaseException, *, rank: int, node_rank: int, restart: int, log: str
) -> FailureRecord:
    """Return the record of an exception that ended this worker."""
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
        step=None if _is_transient(error) else getattr(error, _STEP, None),
        code=_code(error),
    )


def of_error_file(path: Path, status: int, **fields: Any) -> FailureRecord | None:
    """Return the record of an error that a program itself has reported, as `record` of torch does.

    Args:
        path: the file that `TORCHELASTIC_ERROR_FILE` names. Any program may have written it.
        status: the exit status of the program. A program that a signal ended reported another
            error, which it has survived.
        **fields: `rank`, `node_rank`, `restart`, `log` and others.

    Returns:
        The record. None if there is no file, or it holds something else.
    """
    if status < 0:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace")[: checked.MOST])
    except (OSError, ValueError, RecursionError):
        return None
    found, trace = _value(data, "message"), ""
    if isinstance(found, dict):
        trace = str(_value(found.get("extraInfo"), "py_callstack") or "")
        found = found.get("message")
    if not isinstance(found, str) or not found.strip():
        return None
    type_, colon, message = found.partition(": ")
    if not colon or not type_.isidentifier():
        type_, message = "an error", found
    frames = [
        Frame(each["file"], int(each["line"]), each["function"], each["code"] or "")
        for each in _TRACE_LINE.finditer(trace)
    ]
    kept = only_user_frames(frames) or frames[-1:]
    fields = {"type": type_, "frames": kept, "traceback": trace, **fields}
    return of_worker("exception", message[:_MAX_MESSAGE], status, **fields)


def _value(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, dict) else None


def set_step(error: BaseException, step: int) -> None:
    """Note on an exception the optimizer step in which it was raised, unless it already has one."""
    if not hasattr(error, _STEP):
        setattr(error, _STEP, step)


def _is_transient(error: BaseException) -> bool:
    """Return whether a retry may end differently: files, networks, devices, other ranks."""
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


def of_exit_status(status: int, *, out_of_memory: bool, **fields: Any) -> FailureRecord:
    """Return the record of a worker that ended without a report: a signal, or `os._exit`.

    Args:
        status: the status from `os.waitstatus_to_exitcode`, negative for a signal.
        out_of_memory: whether the kernel killed processes meanwhile because memory ran out.
        **fields: `rank`, `node_rank`, `node`, `restart`, `time`, `pid`, `log`.
    """
    if status >= 0:
        return of_worker("exit", f"exited with code {status}", status, **fields)
    name = signal_name(-status)
    if -status == signal.SIGKILL and out_of_memory:
        message = "killed by the kernel: out of memory"
        return of_worker("oom", message, shell_code(status), **fields)
    return of_worker("signal", f"killed by {name}", shell_code(status), **fields)


def user_frames(trace: TracebackType | None, *, blank: bool = False) -> list[Frame]:
    """Return a traceback cut to the user's own lines.

    Frames of dtrain, the standard library and packages are left out. If no frame is left (the error
    is in a library called by dtrain), the innermost one is kept, unless the result may be `blank`.
    """
    frames = [
        Frame(entry.filename, entry.lineno or 0, entry.name, (entry.line or "").strip())
        for entry in traceback.extract_tb(trace)
    ]
    return only_user_frames(frames) or ([] if blank else frames[-1:])


def only_user_frames(frames: list[Frame]) -> list[Frame]:
    """Return the frames that are the user's own."""
    return [frame for frame in frames if _is_user_code(frame.file)]


def node_name() -> str:
    """Return this node's name: the launcher's name for it, or the host name."""
    return os.environ.get("DTRAIN_NODE_NAME") or socket.gethostname()


def is_collateral(message: str) -> bool:
    """Return whether an error only reports that another rank disappeared."""
    return _COLLATERAL.search(message[: checked.MOST]) is not None


def first_cause(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return which of the `worker_failed` events of one restart reports its cause.

    Every node has reported the first failure that it saw.
    """
    return min(events, key=lambda each: (is_collateral(each["what"]), each["time"]))


def is_timeout(message: str) -> bool:
    """Return whether an error reports that another rank did not arrive in time."""
    return is_collateral(message) and _TIMEOUT.search(message) is not None


def signal_name(number: int) -> str:
    """Return the name of a signal: `SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_exit(status: int) -> str:
    """Describe a status, negative for signals: `was killed by SIGKILL` or `ended with code 3`."""
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with code {status}"


def _is_user_code(file: str) -> bool:
    if file.startswith("<") or file.startswith(_PACKAGE_DIR):
        return False
    paths = sysconfig.get_paths()
    return not any(file.startswith(paths[kind]) for kind in ("stdlib", "purelib", "platlib"))
