"""How far a run is, by its events and its lines of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.run.progress import Progress
from dtrain.run.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def started(time: float, resumed_from: int | None = None) -> dict[str, Any]:
    fields = {"total_steps": 48, "resumed_from": resumed_from}
    return {"time": time, "event": "training_started", **fields}


def line(time: float, step: int, split: str = "train", **values: float) -> dict[str, Any]:
    return {"time": time, "step": step, "epoch": 0, "split": split, **values}


def write(run: RunDir, *records: dict[str, Any]) -> Progress:
    for path, key in ((run.events, "event"), (run.metrics, "split")):
        path.write_text("".join(json.dumps(each) + "\n" for each in records if key in each))
    return Progress.read(run)


def test_a_running_training_ends_at_the_rate_of_its_steps(run: RunDir) -> None:
    found = write(run, started(90.0), line(100.0, 1, loss=2.0), line(120.0, 11, loss=1.0))
    assert (found.step, found.total_steps, found.percent) == (11, 48, 22)
    assert found.seconds_per_step == 2.0  # what came before the first step is left out
    assert found.end == 120.0 + 37 * 2.0
    assert found.metrics == {"train": {"loss": 1.0}}


def test_the_last_step_is_the_last_that_was_done_not_logged(run: RunDir) -> None:
    saved = {"time": 5.0, "event": "checkpoint_saved", "step": 44, "checkpoint": "step-44"}
    found = write(run, started(1.0), line(2.0, 1), line(4.0, 40), saved)
    assert (found.step, found.checkpoint) == (44, "step-44")
    left = {"time": 6.0, "event": "stopped", "step": 45, "reason": "SIGTERM", "rank": 0}
    assert write(run, started(1.0), line(4.0, 40), saved, left).step == 45
    finished = {"time": 7.0, "event": "finished", "steps": 48}
    done = write(run, started(1.0), line(4.0, 40), saved, finished)
    assert (done.step, done.percent) == (48, 100)


def test_steps_that_a_resume_does_again_are_not_done(run: RunDir) -> None:
    resumed = {"time": 10.0, "event": "resumed", "step": 20, "checkpoint": "step-20"}
    found = write(run, started(1.0), line(2.0, 1), line(5.0, 40), started(11.0, 20), resumed)
    assert found.step == 20
    assert found.end is None, "nothing is known of its rate"


def test_what_an_epoch_logged_is_not_forgotten_for_the_next_steps_line(run: RunDir) -> None:
    found = write(run, line(1.0, 8, loss=1.0), line(2.0, 8, of_epoch=3.0), line(3.0, 9, loss=0.5))
    assert found.metrics["train"] == {"loss": 0.5, "of_epoch": 3.0}


def test_damaged_and_unfinished_files(run: RunDir) -> None:
    assert write(run).step is None
    run.events.write_text('{"time": 1, "event": "finished", "steps": "many"}\n{"ti')
    run.metrics.write_text('[]\n{"time": "x", "split": "train", "step": 3}\n')
    found = Progress.read(run)
    assert (found.step, found.percent, found.end) == (None, None, None)


def test_recent_lines_are_enough_for_the_newest_values(run: RunDir) -> None:
    early = [
        line(1.0, 1, "eval", acc=0.1),
        line(2.0, 2, "eval", acc=0.2),
        line(3.0, 3, "test", b=1),
    ]
    many = [line(10.0 + step, step, loss=1 / step) for step in range(1, 30_000)]
    whole = write(run, started(0.5), *early, *many)
    recent = Progress.read(run, recent=True)
    assert recent.metrics == whole.metrics
    assert (recent.step, recent.end) == (whole.step, whole.end)
    text = run.metrics.read_text()
    run.metrics.write_text(text.replace('"acc": 0.1', '"acc": 0.1}'))  # not parsed
    assert Progress.read(run, recent=True) == recent
    short = write(run, started(0.5), *early)
    assert Progress.read(run, recent=True) == short
