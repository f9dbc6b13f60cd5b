"""The time of ranks in phases, over the time of a run."""

from __future__ import annotations

import pytest

from dtrain.report.phase_grid import NUM_COLUMNS, PhaseGrid


def record(end: float, steps: int, **phases: float) -> dict[str, object]:
    return {"time": end, "step": steps, "steps": steps, "phases": phases}


def test_nothing_is_lost_where_a_record_spans_columns() -> None:
    grid = PhaseGrid(0.0, float(NUM_COLUMNS))
    grid.add(0, record(7.3, 10, forward=2.0, reduction=3.5))
    grid.add(0, record(5000.0, 2, forward=1.0))  # after the end
    assert grid.rank_seconds(0) == pytest.approx({"steps": 12, "forward": 3.0, "reduction": 3.5})
    (row,) = grid.shares("reduction")
    covered = [column for column, value in enumerate(row) if value is not None]
    assert covered == [*range(1, 8), NUM_COLUMNS - 1]
    assert row[4] == pytest.approx(3.5 / 5.5)
    assert grid.own_seconds()[0][4] == pytest.approx(0.2)
    assert grid.own_seconds()[0][50] is None


def test_the_straggler_is_the_rank_with_the_longest_own_part() -> None:
    grid = PhaseGrid(0.0, 100.0)
    for rank in range(4):
        own = 2.0 if rank == 2 else 1.0
        grid.add(rank, record(50.0, 10, forward=own, reduction=3.0 - own))
    assert grid.straggler() == (2, pytest.approx(2.0))
    assert grid.ranks == [0, 1, 2, 3]


@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_equal_ranks_have_no_straggler(ranks: int) -> None:
    grid = PhaseGrid(0.0, 100.0)
    for rank in range(ranks):
        grid.add(rank, record(50.0, 10, forward=1.0 + 0.01 * rank))
    assert grid.straggler() is None
