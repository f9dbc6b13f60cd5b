"""The clock that a rank measures its phases with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dtrain.ranks import RankInfo
from dtrain.run import files
from dtrain.run.rundir import RunDir
from dtrain.train.metrics.phases import PhaseClock


def clock(run: RunDir) -> PhaseClock:
    made = PhaseClock(run, RankInfo.from_env(), 0, torch.device("cpu"))
    made.begin()
    return made


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [*files.read_lines(run.phases(0, 0, 0))]


def spend(seconds: float) -> None:
    """Spend processor time, so that nothing waits."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_each_moment_is_in_one_phase(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    began = time.perf_counter()
    each = clock(run)
    each.enter("data")
    spend(0.01)
    each.enter("forward")
    spend(0.02)
    with each.within("evaluation"):
        spend(0.03)
        with each.within("checkpoint"):
            spend(0.01)
    spend(0.02)
    each.step_done(7)
    each.close()
    passed = time.perf_counter() - began
    (line,) = lines(run)
    found = line["phases"]
    assert (line["step"], line["steps"], line["restart"]) == (7, 1, 0)
    assert found["data"] >= 0.01
    assert found["forward"] >= 0.04  # before and after the evaluation
    assert found["evaluation"] >= 0.03
    assert found["checkpoint"] >= 0.01
    assert 0.09 <= sum(found.values()) <= passed


def test_a_line_a_second_has_the_time_since_the_last(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    each = clock(run)
    began = time.perf_counter()
    step = 0
    while time.perf_counter() - began < 2.3:
        step += 1
        each.enter("forward")
        spend(0.01)
        each.enter("other")
        each.step_done(step)
    each.close()
    found = lines(run)
    assert len(found) == 3
    assert [line["step"] for line in found] == sorted({line["step"] for line in found})
    assert sum(line["steps"] for line in found) == step
    assert 2.2 < sum(sum(line["phases"].values()) for line in found) < 3.5


def test_a_directory_that_is_gone_ends_no_training(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "file" / "run")
    (tmp_path / "file").write_text("")
    each = clock(run)
    each.step_done(1)
    each.close()
    assert not run.path.exists()
