"""What a rank's profile says of its operators and its communication."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtrain.job.spec import StepProfileSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.run.step_profile import StepProfile, read_step_profiles
from dtrain.train.metrics.phases import PhaseClock
from dtrain.train.metrics.profiler import (
    Span,
    StepProfiler,
    _without_calls,
    communication,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first profile of a process sets this variable, and a test must leave none behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def spans(*times: tuple[str, float, float]) -> list[Span]:
    return [Span(name, start, end, name.startswith("gloo")) for name, start, end in times]


def test_the_share_of_communication() -> None:
    found = communication(
        spans(
            ("gloo:all_reduce", 1.0, 3.0), ("gloo:all_reduce", 2.0, 4.0), ("gloo:send", 6.0, 7.0),
            ("mm", 0.0, 1.5), ("mm", 0.5, 2.0), ("add", 3.5, 6.5),
        ),
        8.0,
    )  # fmt: skip
    assert found.seconds == pytest.approx(4.0)  # 1 to 4, and 6 to 7
    assert found.share == pytest.approx(0.5)
    assert found.overlapped == pytest.approx(2 / 4)  # 1 to 2, 3.5 to 4, 6 to 6.5
    assert found.calls == {"gloo:all_reduce": 2, "gloo:send": 1}


def test_an_operator_computes_where_it_calls_no_other() -> None:
    def event(start: float, end: float, *calls: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), cpu_children=calls)

    assert list(_without_calls(event(1, 9, event(5, 7), event(2, 4)))) == [(1, 2), (4, 5), (7, 9)]
    assert list(_without_calls(event(1, 4, event(1, 4)))) == []


def test_without_communication() -> None:
    found = communication(spans(("mm", 0.0, 1.0)), 2.0)
    assert (found.seconds, found.share, found.overlapped, found.calls) == (0.0, 0.0, 0.0, {})


def train(run: RunDir, steps: str, first: int, last: int) -> None:
    """Steps of a product, with a clock that profiles some of them."""
    rank: Any = (run, RankInfo.from_env(), 0, torch.device("cpu"))
    spec = StepProfileSpec.model_validate({"steps": steps})
    clock = PhaseClock(*rank, StepProfiler(spec, *rank))
    clock.begin(first - 1)
    for step in range(first, last + 1):
        clock.enter("forward")
        torch.ones(30, 30) @ torch.ones(30, 30)
        clock.enter("optimizer")
        clock.step_done(step)
    clock.close()


def profile_of(run: RunDir) -> StepProfile:
    (found,) = read_step_profiles(run)
    return found


@pytest.mark.parametrize(
    ("steps", "first", "last", "recorded"),
    [("3:5", 1, 8, (3, 5)), ("1", 1, 8, (1, 1)), ("3:9", 5, 7, (5, 7)), ("7:9", 1, 7, (7, 7))],
)
def test_the_steps_that_are_recorded(
    steps: str, first: int, last: int, recorded: tuple[int, int], tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    train(run, steps, first, last)
    found = profile_of(run)
    assert (found.first_step, found.last_step) == recorded
    calls = {each.name: each.calls for each in found.operators}
    assert calls["aten::mm"] == found.num_steps
    assert not [name for name in calls if name.startswith(("ProfilerStep", "dtrain"))]
    with gzip.open(tmp_path / found.trace) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for step in range(recorded[0], recorded[1] + 1):
        assert names.count(f"ProfilerStep#{step}") == 1
    assert names.count("dtrain: forward") == found.num_steps


@pytest.mark.parametrize("steps", ["9:12", "1:2"])
def test_steps_that_do_not_come(steps: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    train(run, steps, 3, 6)
    assert not list(tmp_path.rglob("rank-*profile.json"))


def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("not a directory\n")
    train(RunDir(tmp_path), "2:3", 1, 4)


def test_a_damaged_summary_is_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    train(run, "2:3", 1, 4)
    run.step_profile(0, 0, 7).write_text('{"rank": 7}')
    assert profile_of(run).rank == 0
