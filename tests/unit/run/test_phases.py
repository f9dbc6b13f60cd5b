"""The records of phases and of what is used: when they are due, and how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.run import files, phases
from dtrain.run.rundir import RunDir


@pytest.mark.parametrize(("hours", "lines"), [(0.25, 900), (8, 4300), (24 * 7, 14_000)])
def test_a_long_run_has_few_lines(
    monkeypatch: pytest.MonkeyPatch, hours: float, lines: int
) -> None:
    now = 1000.0
    monkeypatch.setattr(phases.time, "monotonic", lambda: now)
    pace, due = phases.Pace(), 0
    for _ in range(int(hours * 3600 / 0.5)):
        now += 0.5
        due += pace.due()
    assert 0.85 * lines < due < 1.15 * lines


def test_records_are_read_by_rank_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    line = {"time": 1.0, "restart": 0, "step": 3, "steps": 3, "phases": {"data": 0.5}}
    for node_rank, rank in ((1, 10), (0, 2)):
        path = run.phases(0, node_rank, rank)
        files.make_parent(path)
        files.append_line(path, line)
    with run.phases(0, 1, 10).open("a") as file:
        file.write('{"time": 2.0, "step": 4, "steps": 1, "phases": 7}\n{"time": 3')
    (run.node(0, 0) / "rank-x.phases.jsonl").write_text("{}\n")
    assert [(rank, each["step"]) for rank, each in phases.read_phases(run, 0)] == [(2, 3), (10, 3)]
    assert [*phases.read_phases(run, 1)] == []


def test_usage_is_read_by_node(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for node_rank in (11, 2):
        files.make_parent(run.usage(0, node_rank))
        files.append_line(run.usage(0, node_rank), {"time": 1.5})
    assert [node_rank for node_rank, _ in phases.read_usage(run, 0)] == [2, 11]
