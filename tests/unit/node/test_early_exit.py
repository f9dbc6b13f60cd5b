"""How a worker leaves with status 0, and what its agent knows of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dtrain.node import early_exit
from dtrain.run.failures import Frame
from dtrain.run.flight_recorder import Ring, read_ring


@pytest.mark.parametrize(("status", "ends"), [(0, 7), (3, 3)])
def test_an_exit_that_raises_nothing_is_heard_with_its_line(status: int, ends: int) -> None:
    """But not that of a process forked in there."""
    ring = Ring()

    def tell(frames: list[Frame]) -> int:
        early_exit.save_note(ring, "os._exit(0)", frames, False)
        return 7

    pid = os.fork()
    if pid == 0:
        with early_exit.watch_exit(tell):
            child = os.fork()
            if child == 0:
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                os._exit(status)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ends
    if status == 0:
        note = json.loads(ring.exit_note())
        assert (
            note["frames"][-1]["function"]
            == test_an_exit_that_raises_nothing_is_heard_with_its_line.__name__
        )
        made = early_exit.of_script(note, rank=1, node_rank=0, node="n", time=1.0)
        assert (made.kind, made.exit_code, made.frames[-1].code) == (
            "early_exit",
            0,
            "os._exit(status)",
        )
    else:
        assert ring.exit_note() == b""


def test_outside_nothing_is_changed() -> None:
    before = os._exit
    with early_exit.watch_exit(lambda frames: 0):
        assert os._exit is not before
    assert os._exit is before


def test_a_note_that_is_too_long_has_fewer_lines(tmp_path: Path) -> None:
    ring = Ring()
    ring.write(1, "barrier()")
    long = Frame("/deep" * 300, 1, "f", "x")
    for frames, left in (([long] * 3, 1), ([long, Frame("/deep" * 1000, 1, "f", "x")], 0)):
        early_exit.save_note(ring, "sys.exit(0)", frames, True)
        assert len(json.loads(ring.exit_note())["frames"]) == left
    (tmp_path / "ring").write_bytes(ring.contents())
    assert read_ring(tmp_path / "ring") == {1: "barrier()"}
