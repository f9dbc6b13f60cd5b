"""The arithmetic of benchmarks/startup.py."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from support import ROOT

NOBODY: frozenset[int] = frozenset()


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as it finds its own modules when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("startup")


@pytest.fixture
def launches(startup: ModuleType) -> ModuleType:
    return importlib.import_module("launches")


def test_the_last_rank_counts(launches: ModuleType) -> None:
    steps = launches.parse_steps("0 1 10.0 70\n1 1 12.5 71\n0 2 13.0 70\n1 2 14.0 7")
    assert [step.pid for step in steps] == [70, 71, 70]  # the line cut short is passed over
    assert launches.first_on_all(steps, 2, NOBODY) == 12.5
    assert launches.first_on_all(steps, 3, NOBODY) is None


def test_after_a_kill_only_new_processes_count(launches: ModuleType) -> None:
    steps = launches.parse_steps("0 1 1.0 70\n1 1 1.0 71\n0 2 2.0 70\n0 1 8.0 80\n1 1 9.0 81\n")
    assert launches.first_on_all(steps, 2, frozenset({70, 71})) == 9.0
    assert launches.first_on_all(steps[:4], 2, frozenset({70, 71})) is None


def test_the_table_shows_medians_and_their_ratio(startup: ModuleType) -> None:
    row = startup.Row("--help", 5, dtrain=[0.1, 0.2, 0.9], torchrun=[2.0, 1.0, 3.0])
    assert row.ratio == 10.0
    lines = startup.table([row]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "--help",
        "0.20 (0.10 - 0.90)",
        "2.00 (1.00 - 3.00)",
        "10.0 x",
        "5 x",
    ]


def test_both_train_the_same_model(launches: ModuleType) -> None:
    """What the by-hand script repeats of the example."""
    task = (ROOT / "examples" / "digits" / "task.py").read_text()
    by_hand = launches.BY_HAND.read_text()
    for part in ("kernel_size=3, padding=1", "nn.MaxPool2d(2)", "nn.Linear(16 * ", "LinearLR("):
        assert task.count(part) == by_hand.count(part), part
    assert "width: int = 16" in task
    assert "WIDTH = 16" in by_hand
    for number in ("0.01", "0.05", "230", "360"):
        assert number in task
        assert number in by_hand


def test_ratios_are_to_the_first_way(startup: ModuleType) -> None:
    lines = startup.beside("what", {"ours": [2.0, 1.0, 3.0], "theirs": [5.0]}).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["1.00 ×", "2.50 ×"]
