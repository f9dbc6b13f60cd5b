"""What is said of a run that was stopped, from its events."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.run import events, files
from dtrain.run.rundir import RunDir

BEGUN = {"event": "training_started", "attempt": 1}
SAVED = {"event": "checkpoint_saved", "attempt": 1, "step": 40}
STOPPED = {"event": "stopped", "attempt": 1, "reason": "SIGTERM", "rank": 2, "step": 47}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], []),
        ([BEGUN, SAVED, STOPPED], ["SIGTERM to rank 2", "after step 47"]),
        ([BEGUN, SAVED], ["before it could save", "step 40"]),
        (
            [{**BEGUN, "attempt": 0}, {**SAVED, "attempt": 0}, BEGUN],
            ["before it could save", "step 40"],
        ),
        ([BEGUN], ["before it could save", "there is none"]),
        ([BEGUN, {"event": "finished", "attempt": 1}], []),
        ([{**BEGUN, "attempt": 0}], []),
    ],
)
def test_a_run_that_was_stopped(tmp_path: Path, lines: list[object], said: list[str]) -> None:
    run = RunDir(tmp_path / "a-run")
    run.create()
    for line in lines:
        files.append_line(run.events, line)
    text = events.stop_message(run, 1, 143)
    assert f"continue with: dtrain resume {run.id}" in text
    assert all(words in text for words in said), text
    assert ("before it could save" in text) == ("before it could save" in " ".join(said))
