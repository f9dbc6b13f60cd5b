"""The verdict: which rank failed first, and why. It combines all nodes' failure records.

It is made on the launch plane when no process of the attempt runs any more, and later for `dtrain
why`.
"""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.run import failures, files
from dtrain.run.failures import FailureRecord, Frame, Kind
from dtrain.run.flight_recorder import first_divergence, read_ring
from dtrain.run.rundir import RunDir
from dtrain.words import numbered

MAX_LINES = 15
"""The most lines of the block. A reason that is longer is an exception."""
_WIDTH = 110
"""The columns of the reason when the output has no width."""
_NARROWEST = 40
"""The columns below which the terminal folds the text."""
_FAILED = "FAILED: "
_NOT_TO_RESUME = ("UsageError", "NeverMadeError")
"""Errors that a retry would repeat."""
_FILE = re.compile(r'^  File "(.+)", line \d+, in ', re.MULTILINE)
_MOST_LOCATIONS = 3
_CONSEQUENCE = 3
"""The sort key of a rank that failed because another rank did."""

ADVICE = {
    "oom": "ask for more memory, or make micro_batch_size or data.workers smaller",
    "node_missing": "check that the agent was started there and that it can reach the head node",
    "node_lost": "look at that host; `dtrain resume` continues from the last checkpoint",
    "undecided": "look before these lines for a branch that only some ranks take",
    "early_exit": "leave the loop in the same step on all ranks",
    "timeout": "look for a collective that not all ranks call, and at the network between them",
}
"""The remedy for each kind of failure, if the record has no hint of its own."""


Paint = Callable[[str, str | None], str]
"""A function that gives a text a colour, or none."""


@dataclass(frozen=True)
class Verdict:
    culprit: FailureRecord
    same_failure: list[int] = field(default_factory=list)
    """Other ranks that failed in the same way, for example all of them when a disk is full."""
    collateral: list[int] = field(default_factory=list)
    """Ranks that failed because the root cause's rank did."""
    restarts: int = 0
    """The number of restarts that were tried."""

    @property
    def exit_code(self) -> int:
        """Return the root cause's exit status, as a shell reports it."""
        return self.culprit.exit_code or 1

    def to_json(self) -> dict[str, Any]:
        """Return the verdict for `--json` and verdict.json."""
        return {
            "code": self.culprit.code,
            "culprit": asdict(self.culprit),
            "same_failure": self.same_failure,
            "collateral": self.collateral,
            "exit_code": self.exit_code,
            "restarts": self.restarts,
        }


def cause_on_node(
    failed: list[FailureRecord], absent: list[FailureRecord], left: list[FailureRecord]
) -> FailureRecord:
    """Return what one node reports to the others: a failure that is a cause, or else the first."""
    first = min(failed, key=lambda each: (failures.is_collateral(each.message), each.time))
    if absent and failures.is_timeout(first.message):
        return absent[0]
    return left[0] if left and all(map(was_cut_off, failed)) else first


def judge(run: RunDir, attempt: int) -> Verdict | None:
    """Read every failure record of an attempt and find the root cause. None when nothing failed.

    Only the records of the last restart count: an error that a restart overcame is not the cause.
    """
    records = failures.read_all(run, attempt)
    if not records:
        return None
    last = max(record.restart for record in records)
    records = [record for record in records if record.restart == last]
    records += _diverged(run, attempt, last, records)
    records = _failed_themselves(records)
    first = min(records, key=_cause_order)
    if len(records) > 1 and _only_waited(records):
        lines = ["the ranks waited for one another in a collective until it timed out"]
        lines += (waits := _waits(records))
        frames = [] if waits else first.frames
        timeout = replace(first, kind="timeout", code="", rank=None, type="", frames=frames,
                          message="\n".join(lines))  # fmt: skip
        return Verdict(timeout, collateral=_ranks(records), restarts=last)
    error = _error_of(first)
    same = [record for record in records if _error_of(record) == error]
    others = [record for record in records if _error_of(record) != error]
    culprit = min(same, key=lambda record: -1 if record.rank is None else record.rank)
    lines = [
        culprit.message,
        *(_waits(others) if culprit.kind in ("absent", "early_exit") else []),
    ]
    return Verdict(
        replace(culprit, message="\n".join(lines)),
        same_failure=_ranks(record for record in same if record is not culprit),
        collateral=_ranks(record for record in others if record.rank != culprit.rank),
        restarts=last,
    )


def _failed_themselves(records: list[FailureRecord]) -> list[FailureRecord]:
    """Return the records of ranks that failed themselves.

    Records of ranks that still ran are left out, unless the others only waited for them. Records of
    ranks that had left with status 0 are left out, unless this cut off the others.
    """
    left = [record for record in records if record.kind == "early_exit" and record.exit_code == 0]
    ended = [record for record in records if record.kind != "absent" and record not in left]
    if not ended or _only_waited(ended):
        return records
    workers = [record for record in ended if record.kind != "agent"]
    return [*ended, *left] if workers and all(map(was_cut_off, workers)) else ended


def was_cut_off(record: FailureRecord) -> bool:
    """Return whether a rank failed in a collective because another rank disappeared.

    A message alone is not enough: a server that refuses a connection has nothing to do with ranks
    that ended before.
    """
    files = _FILE.findall(record.traceback)
    return _cause_order(record)[0] >= _CONSEQUENCE and bool(files) and "/torch/" in files[-1]


def _only_waited(records: list[FailureRecord]) -> bool:
    """Return whether all ranks failed because a collective was not answered in time."""
    consequences = all(
        _cause_order(r)[0] >= _CONSEQUENCE and r.kind != "early_exit" for r in records
    )
    return consequences and any(failures.is_timeout(record.message) for record in records)


def _diverged(
    run: RunDir, attempt: int, restart: int, records: list[FailureRecord]
) -> list[FailureRecord]:
    """Return a record of the rank whose collectives differed from the others', if there is one."""
    files = sorted(run.collectives(attempt, restart).glob("rank-*"))
    rings = {int(path.name.removeprefix("rank-")): read_ring(path) for path in files}
    found = first_divergence(rings)
    if found is None:
        return []
    kind: Kind = "collectives" if found.decided else "undecided"
    if found.decided:
        what, own, other = "its collectives differ from the other ranks'", "", "elsewhere"
    else:
        what = f"and rank {found.other} called different collectives; there is no majority"
        own, other = f"on rank {found.rank} ", f"on rank {found.other}"
    message = f"{what}\n{own}number {found.number} is {found.call}\n{other} it is {found.others}"
    of_rank = [record for record in records if record.rank == found.rank]
    first = min(records, key=_cause_order)
    base = of_rank[0] if of_rank else first
    return [replace(base, kind=kind, code="", message=message, rank=found.rank, frames=[],
                    exit_code=first.exit_code)]  # fmt: skip


def write(run: RunDir, attempt: int, verdict: Verdict) -> None:
    """Save the verdict for `dtrain why`."""
    files.write_json(run.verdict(attempt), verdict.to_json())


def read(run: RunDir, attempt: int) -> Verdict | None:
    """Return the verdict saved for an attempt. None when there is none."""
    return files.read_as(Verdict, run.verdict(attempt))


def summary(verdict: Verdict) -> str:
    """Return one line, for example `rank 1 on node 0 (gpu-a) raised ValueError: no such column`."""
    culprit = verdict.culprit
    text = _headline(culprit).removeprefix(_FAILED)
    return f"{text}: {_reason(culprit)[0].strip()}" if culprit.kind == "exception" else text


def render(
    verdict: Verdict,
    run: RunDir,
    width: int | None = None,
    paint: Paint = lambda text, _colour: text,
) -> str:
    """Return the block of text: at most 15 lines, plus the whole reason and the remedy.

    Args:
        verdict: the verdict of an attempt.
        run: its run.
        width: columns, to which lines are folded between words. None means that the output has no
            width: only lines of the reason are folded.
        paint: a function that gives a text its colour.
    """
    culprit = verdict.culprit
    head = [f"{_headline(culprit)}  [{culprit.code}]"]
    tail = [f"  log: {_relative(culprit.log)}"] if culprit.log else []
    advice = culprit.hint or ADVICE.get(culprit.kind)
    if advice:
        tail.append(f"  try: {advice}")
    if verdict.same_failure:
        tail.append(f"  {numbered('rank', verdict.same_failure)} failed in the same way")
    if verdict.collateral:
        tail.append(f"  {numbered('rank', verdict.collateral)} failed as a consequence")
    if culprit.repeated:
        step = f"in step {culprit.step}" if culprit.step else "before the first step"
        tail.append(f"  restarts: {verdict.restarts}; it had failed in the same way {step} before")
    elif verdict.restarts:
        tail.append(f"  restarts: {verdict.restarts}, all that were allowed")
    resume = "" if culprit.type in _NOT_TO_RESUME else f" · dtrain resume {run.id}"
    tail.append(f"  more: dtrain logs {run.id}{_rank_flag(culprit)}{resume}")
    columns = width or _WIDTH
    reason = [line for text in _reason(culprit) for line in _folded(text, columns)]
    if width is not None:
        head = _folded(head[0], columns, "")
        tail = [line for text in tail for line in _folded(text, columns, "")]
    room = MAX_LINES - len(head) - len(reason) - len(tail)
    code = f"[{culprit.code}]"
    head[-1] = head[-1].removesuffix(code) + paint(code, "dim")
    head[0] = paint(_FAILED, "red") + head[0].removeprefix(_FAILED)
    return "\n".join([*head, *_frames(culprit, room, columns), *reason, *tail])


def _waits(records: list[FailureRecord]) -> list[str]:
    """Return the user's lines where ranks waited, summarized in a few lines."""
    ranks: dict[str, list[int]] = {}
    for record in records:
        if record.rank is not None and failures.only_user_frames(record.frames):
            ranks.setdefault(location(record.frames[-1]), []).append(record.rank)
    lines = [f"{numbered('rank', sorted(on))} waited at {where}" for where, on in ranks.items()]
    return lines[:_MOST_LOCATIONS]


def location(frame: Frame) -> str:
    return f"{'/'.join(Path(frame.file).parts[-2:])}:{frame.line} in {frame.function}"


def _error_of(record: FailureRecord) -> tuple[str, str, str, bool]:
    return record.kind, record.type, record.message, record.collateral


def _ranks(records: Iterable[FailureRecord]) -> list[int]:
    return sorted(record.rank for record in records if record.rank is not None)


def _cause_order(record: FailureRecord) -> tuple[int, float]:
    """Return the sort key: a cause comes before a consequence, then the earliest failure."""
    if record.kind in ("node_missing", "node_lost"):
        return (0, record.time)
    if record.kind in ("collectives", "undecided"):
        return (1, 0.0)
    if record.kind == "agent":
        return (_CONSEQUENCE + 1, record.time)
    if record.kind == "early_exit" and record.collateral:  # cleanly: others may fail before it ends
        return (_CONSEQUENCE - 1, record.time)
    lost_peer = record.kind == "exception" and failures.is_collateral(record.message)
    if record.collateral or lost_peer:
        return (_CONSEQUENCE, record.time)
    return (1, record.time)


def _headline(culprit: FailureRecord) -> str:
    if culprit.kind == "timeout":
        return f"{_FAILED}{_first_line(culprit.message)}"
    if culprit.rank is None:
        return f"{_FAILED}{_node_of(culprit)}: {_first_line(culprit.message)}"
    where = f"rank {culprit.rank} on {_node_of(culprit)}"
    if culprit.kind == "exception":
        return f"{_FAILED}{where} raised {culprit.type}"
    colon = "" if culprit.kind in ("absent", "early_exit", "undecided") else ":"
    return f"{_FAILED}{where}{colon} {_first_line(culprit.message)}"


def _node_of(culprit: FailureRecord) -> str:
    """Return `node 1 (name)`. A node that never came may have no name."""
    return f"node {culprit.node_rank}" + (f" ({culprit.node})" if culprit.node else "")


def _frames(culprit: FailureRecord, room: int, width: int) -> list[str]:
    """Return the innermost calls that fit in the room. The last one is always included."""
    shown: list[str] = []
    for frame in reversed(culprit.frames[-3:]):
        lines = [f"  {_relative(frame.file)}:{frame.line} in {frame.function}"]
        lines += _folded(frame.code, width, "    ") if frame.code else []
        if shown and len(shown) + len(lines) > room:
            break
        shown = [*lines, *shown]
    return shown


def _reason(culprit: FailureRecord) -> list[str]:
    """Return the parts of the reason that the first line does not contain."""
    lines = [line for line in culprit.message.splitlines() if line.strip()]
    if culprit.kind == "early_exit":
        return [*lines[1:], time.strftime("it exited at %H:%M:%S", time.localtime(culprit.time))]
    if culprit.kind != "exception":
        return lines[1:]
    return lines or [f"{culprit.type} without a message"]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"


def _folded(text: str, width: int, indent: str = "  ") -> list[str]:
    """Fold a line without cutting any part. Further lines are indented."""
    spaces = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        max(width, _NARROWEST),
        initial_indent=indent + spaces,
        subsequent_indent=f"{indent}{spaces}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _relative(path: str) -> str:
    """Return a path relative to the current directory, when that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:
        return path
    return relative if len(relative) < len(path) and not relative.startswith("../..") else path


def _rank_flag(culprit: FailureRecord) -> str:
    return "" if culprit.rank is None else f" --rank {culprit.rank}"
