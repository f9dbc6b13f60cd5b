"""A rank that ends with status 0 before the others are done: how, and from which line.

The others only see that their connections to it are closed. So a worker keeps how it left, and
its agent tells that where others fail in a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from dtrain.run import failures
from dtrain.run.failures import FailureRecord, Frame
from dtrain.run.flight_recorder import NOTE_BYTES, Ring


@contextlib.contextmanager
def hearing_exit(tell: Callable[[list[Frame]], int]) -> Iterator[None]:
    """Hear of an `os._exit(0)` in here, which raises nothing.

    Args:
        tell: is given the user's lines that led to it; returns the status to end with.
    """
    end, pid = os._exit, os.getpid()

    def heard(status: int) -> None:
        os._exit = end
        if status == 0 and os.getpid() == pid:  # a loader process ends in this way too
            stack = [
                Frame(each.filename, each.lineno or 0, each.name, (each.line or "").strip())
                for each in traceback.extract_stack(sys._getframe(1))
            ]
            status = tell(failures.users_own(stack))
        end(status)

    os._exit = heard  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = end


def keep(ring: Ring | None, how: str, frames: list[Frame], in_order: bool) -> None:
    """Keep how this process leaves, for its agent; by hand there is none.

    Args:
        ring: shared with who started this process.
        how: in words, as `sys.exit(0)`.
        frames: the user's lines, outermost first.
        in_order: whether it has destroyed its process group, so that others are suspected before.
    """
    for shown in (frames[-3:], frames[-1:], []):
        note = {"how": how, "in_order": in_order, "frames": [asdict(frame) for frame in shown]}
        raw = json.dumps(note).encode()
        if ring is not None and len(raw) <= NOTE_BYTES:
            ring.leave(raw)
            break


def of_task(record: FailureRecord, how: str) -> FailureRecord:
    """Make a rank's record that of one that left: a task's training ends by itself.

    Args:
        record: where it was.
        how: in words, as `sys.exit(0)`.
    """
    where = f" in step {record.step}" if record.step else ""
    message = f"left early, by {how}{where}: training had not ended"
    return replace(record, kind="left", code="", message=message, exit_code=1, type="")


def of_script(note: dict[str, Any], **place: Any) -> FailureRecord:
    """Make the record of a script's rank; the verdict knows whether it is to blame.

    Args:
        note: what `keep` has kept.
        **place: `rank`, `node_rank`, `node`, `restart`, `time`, `pid`, `log`.
    """
    return failures.of_worker(
        "left",
        f"left early, by {note['how']}: others still waited for it",
        0,
        collateral=note["in_order"],
        frames=[Frame(**frame) for frame in note["frames"]],
        **place,
    )
