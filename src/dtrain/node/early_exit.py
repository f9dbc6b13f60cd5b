"""A rank that ends with status 0 before the others are done: how it exited, and from which line.

The other ranks only see that their connections to it are closed. So a worker records how it exited,
and its agent reports that if others fail in a collective.
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
def watch_exit(report: Callable[[list[Frame]], int]) -> Iterator[None]:
    """Detect an `os._exit(0)` within the `with` block. It raises no exception.

    Args:
        report: called with the user's lines that led to it. It returns the status to end with.
    """
    end, pid = os._exit, os.getpid()

    def watched(status: int) -> None:
        os._exit = end
        if status == 0 and os.getpid() == pid:  # a loader process also ends in this way
            stack = [
                Frame(each.filename, each.lineno or 0, each.name, (each.line or "").strip())
                for each in traceback.extract_stack(sys._getframe(1))
            ]
            status = report(failures.only_user_frames(stack))
        end(status)

    os._exit = watched  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = end


def save_note(ring: Ring | None, how: str, frames: list[Frame], is_clean: bool) -> None:
    """Record how this process exits, for its agent. There is none if it was started by hand.

    Args:
        ring: the ring shared with the process that started this one.
        how: a description, for example `sys.exit(0)`.
        frames: the user's lines, outermost first.
        is_clean: whether it has destroyed its process group, so that others are suspected first.
    """
    for shown in (frames[-3:], frames[-1:], []):
        note = {"how": how, "is_clean": is_clean, "frames": [asdict(frame) for frame in shown]}
        raw = json.dumps(note).encode()
        if ring is not None and len(raw) <= NOTE_BYTES:
            ring.set_exit_note(raw)
            break


def of_task(record: FailureRecord, how: str) -> FailureRecord:
    """Make a rank's record that of one that exited: dtrain ends a task's training itself.

    Args:
        record: the record with its location.
        how: a description, for example `sys.exit(0)`.
    """
    where = f" in step {record.step}" if record.step else ""
    message = f"exited early, by {how}{where}: training had not finished"
    return replace(record, kind="early_exit", code="", message=message, exit_code=1, type="")


def of_script(note: dict[str, Any], **fields: Any) -> FailureRecord:
    """Return the record of a script's rank. The verdict decides whether it is the cause.

    Args:
        note: what `save_note` has recorded.
        **fields: `rank`, `node_rank`, `node`, `restart`, `time`, `pid`, `log`.
    """
    return failures.of_worker(
        "early_exit",
        f"exited early, by {note['how']}: others still waited for it",
        0,
        collateral=note["is_clean"],
        frames=[Frame(**frame) for frame in note["frames"]],
        **fields,
    )
