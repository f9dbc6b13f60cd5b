"""What `dtrain top` knows of written runs, and how it draws a curve."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import dtrain
from dtrain.run import files
from dtrain.run.rundir import RunDir
from dtrain.top.view import curve
from dtrain.top.watch import Watch
from support.launch import TINY


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    plan = dtrain.plan(TINY, runs=tmp_path, run_id="a", procs=4)
    run = plan.run
    run.attempt(0).mkdir(parents=True)
    files.write_json(run.plan, plan.to_json())
    return run


def test_steps_that_a_failure_undid_are_forgotten(run: RunDir) -> None:
    watch = Watch(run)
    began = {"time": 0.0, "event": "training_started", "total_steps": 100}
    files.append_line(run.events, {**began, "resumed_from": None})
    watch.update()
    for step in range(1, 9):
        line = {"time": 10.0 + step, "step": step, "epoch": 0, "split": "train", "loss": 1 / step}
        files.append_line(run.metrics, line)
    watch.update()
    assert watch.step == 8
    watch.started = 0.0
    assert watch.eta(now=20.0) == pytest.approx((92.0, 92 * 20 / 8))
    for node, what in (("a", "Connection closed by peer"), ("b", "ValueError: x\ny")):
        event = {"event": "worker_failed", "rank": 1, "node": node, "restart": 0, "what": what}
        files.append_line(run.events, {"time": 19.0, **event})
    files.append_line(run.events, {**began, "resumed_from": 5})
    watch.update()
    assert watch.step == 5
    assert [step for step, _ in watch.metrics["train", "loss"]] == [1, 2, 3, 4, 5]
    assert watch.failures == ["rank 1 on b: ValueError: x"]
    assert watch.eta(now=30.0) is None  # the speed is not known again


def test_damaged_lines_are_passed_over(run: RunDir) -> None:
    watch = Watch(run)
    run.node(0, 0).mkdir()
    for path in (run.events, run.metrics, run.usage(0, 0), run.phases(0, 0, 2)):
        path.write_text(
            '{"event": "worker_failed"}\n{"step": "x"}\n[1]\n{"phases": 3}\nnonsense\n'
            '{"time": "x", "steps": 1, "phases": {}, "step": 1, "split": "train"}\n'
            '{"time": 1, "steps": "x", "phases": {"data": 1}}\n'
            '{"time": 1, "event": "training_started", "total_steps": "y", "resumed_from": "x"}\n'
        )
    watch.update()
    assert (watch.step, watch.ranks, watch.failures) == (0, {}, [])


def test_warnings_of_all_ranks_are_one(run: RunDir) -> None:
    watch = Watch(run)
    run.node(0, 0).mkdir()
    for rank in range(3):
        run.rank_log(0, 0, rank).write_text(
            f"hello\n2026-01-02 03:04:0{rank},000 WARNING dtrain.x: disk is full\n"
        )
    watch.update()
    assert watch.warnings == {"WARNING dtrain.x: disk is full": {0, 1, 2}}


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 10, ""),
        ([1.0, 1.0], 10, ""),
        ([0.0, 7.0], 10, "▁█"),
        ([*map(float, range(8))], 8, "▁▂▃▄▅▆▇█"),
        ([*map(float, range(800))], 8, "▁▂▃▄▅▆▇█"),
        ([math.nan, 0.0, math.inf, 1.0], 4, "▁█"),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_a_curve(values: list[float], width: int, drawn: str) -> None:
    assert curve(values, width) == drawn
