"""What a run did when, from the events and attempts of written run directories."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.report.timeline import Timeline, read_timeline
from dtrain.run import files
from dtrain.run.attempts import Handle, Result
from dtrain.run.rundir import RunDir


def write_events(run: RunDir, *events: dict[str, Any]) -> None:
    for event in events:
        files.append_line(run.events, event)


def attempt(
    run: RunDir, number: int, started: float, ended: float | None = None, first: int | None = None
) -> None:
    first = number if first is None else first
    handle = Handle("local", number, first, "a", 1, None, started)
    files.write_json(run.handle(number), asdict(handle))
    if ended is not None:
        files.write_json(run.result(number), asdict(Result("succeeded", 0, started, ended)))


def spans(line: Timeline) -> list[tuple[str, float, float]]:
    return [(span.kind, span.start, span.end) for span in line.spans]


def at(when: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": when, "event": event, **fields}


def test_a_restart_repeats_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt(run, 0, 100, 200)
    write_events(
        run,
        at(101, "agent_started"),
        at(105, "workers_started", restart=0),
        at(110, "training_started", resumed_from=None, world_size=2),
        at(130, "checkpoint_saved", step=20),
        at(150, "worker_failed", rank=1, what="ValueError: no\nmore"),
        at(152, "workers_started", restart=1),
        at(155, "training_started", resumed_from=20, world_size=2),
        at(195, "finished", steps=60),
    )
    steps = [(110.0 + k, k) for k in range(1, 40)] + [(155.0 + k, 20 + k) for k in range(1, 40)]
    line = read_timeline(run, steps, running=False)
    assert spans(line) == [
        ("starting", 100, 110),
        ("training", 110, 130),
        ("repeated", 130, 150),
        ("starting", 150, 155),
        ("training", 155, 195),
        ("starting", 195, 200),
    ]
    assert line.seconds == {
        "training": 60, "repeated": 20, "starting": 20, "queued": 0, "stopped": 0,
    }  # fmt: skip
    assert line.training == (110, 195)
    failed = [event for event in line.events if event.event == "worker_failed"]
    assert [event.text for event in failed] == ["rank 1 failed: ValueError: no"]


def test_two_failures_undo_the_same_steps_twice(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt(run, 0, 0, 40)
    for when in (0, 10, 20):
        write_events(run, at(when, "training_started", resumed_from=None))
        if when < 20:
            write_events(run, at(when + 10, "worker_failed", rank=0, what="x"))
    steps = [(start + k, k) for start in (0.0, 10.0, 20.0) for k in range(1, 9)]
    seconds = read_timeline(run, steps, running=False).seconds
    assert (seconds["repeated"], seconds["training"]) == (20, 20)


def test_a_batch_job_that_is_requeued_waits_in_the_queue(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt(run, 0, 0)
    attempt(run, 1, 80, 120, first=0)
    write_events(
        run,
        at(1, "submitted", job_id="7"),
        at(30, "attempt_started", attempt=0),
        at(31, "agent_started"),
        at(40, "training_started", resumed_from=None),
        at(60, "stopped", step=5, reason="SIGUSR2"),
        at(81, "attempt_started", attempt=1),
        at(90, "training_started", resumed_from=5),
        at(110, "finished"),
    )
    assert spans(read_timeline(run, [(50.0, 5)], running=False)) == [
        ("starting", 0, 1),
        ("queued", 1, 30),
        ("starting", 30, 40),
        ("training", 40, 60),
        ("queued", 60, 80),
        ("starting", 80, 90),
        ("training", 90, 110),
        ("starting", 110, 120),
    ]


def test_between_two_attempts_of_a_user_it_does_not_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt(run, 0, 0, 10)
    attempt(run, 1, 50, 60)
    write_events(run, at(2, "training_started"), at(52, "training_started", resumed_from=3))
    line = read_timeline(run, [], running=False)
    assert ("stopped", 10, 50) in spans(line)
    assert line.end == 60


def test_a_script_trains_from_its_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt(run, 0, 0, 20)
    write_events(
        run,
        at(3, "workers_started", node_rank=0),
        at(4, "workers_started", node_rank=1),
        at(10, "worker_failed", rank=0, what="exit code 1"),
        at(12, "workers_started", node_rank=0),
    )
    assert spans(read_timeline(run, [], running=False)) == [
        ("starting", 0, 3), ("training", 3, 10), ("starting", 10, 12), ("training", 12, 20),
    ]  # fmt: skip


def test_a_run_that_runs_lasts_until_now(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    began = time.time() - 100
    attempt(run, 0, began)
    write_events(run, at(began + 10, "training_started"))
    line = read_timeline(run, [], running=True)
    assert line.spans[-1].kind == "training"
    assert 85 < line.spans[-1].seconds < 100


def test_nothing_has_started(tmp_path: Path) -> None:
    line = read_timeline(RunDir(tmp_path), [], running=False)
    assert (line.spans, line.start, line.end) == ([], 0.0, 0.0)
