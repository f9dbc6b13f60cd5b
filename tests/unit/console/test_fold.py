import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.console.fold import LineFolder, rank_label


def fold(world_size: int, fed: list[tuple[int, str, float]], window_s: float = 1.0) -> list[str]:
    shown: list[str] = []
    folder = LineFolder(world_size, window_s, shown.append)
    for rank, line, now in fed:
        folder.feed(rank, line, now)
    folder.flush(float("inf"))
    return shown


def ranks_of(label: str) -> set[int]:
    ranks: set[int] = set()
    for part in label.split(","):
        low, _, high = part.partition("-")
        ranks |= set(range(int(low), int(high or low) + 1))
    return ranks


def parse(shown: str) -> tuple[set[int], str]:
    match = re.fullmatch(r"\[ranks? ([\d,-]+)\] (.*)", shown, re.DOTALL)
    assert match is not None, shown
    return ranks_of(match[1]), match[2]


@pytest.mark.parametrize(
    ("ranks", "label"),
    [
        ([3], "[rank 3]"),
        ([0, 1], "[ranks 0-1]"),
        ([6, 0, 2, 1, 3], "[ranks 0-3,6]"),
        ([0, 2, 4], "[ranks 0,2,4]"),
        (range(8), "[ranks 0-7]"),
    ],
)
def test_labels(ranks: list[int], label: str) -> None:
    assert rank_label(ranks) == label


@given(st.sets(st.integers(0, 100), min_size=1))
def test_a_label_names_exactly_its_ranks(ranks: set[int]) -> None:
    assert parse(f"{rank_label(ranks)} x") == (ranks, "x")


def test_equal_lines_become_one_and_the_odd_one_stays() -> None:
    fed = [(rank, "a" if rank != 2 else "b", 0.0) for rank in range(4)]
    assert fold(4, fed) == ["[ranks 0-1,3] a", "[rank 2] b"]


def test_times_at_the_start_are_not_compared() -> None:
    fed = [(rank, f"2026-11-22 15:00:01,12{rank} step 1 at 15:00", 0.0) for rank in range(3)]
    assert fold(3, fed) == ["[ranks 0-2] 2026-11-22 15:00:01,120 step 1 at 15:00"]
    assert len(fold(2, [(0, "loss 0.1", 0), (1, "loss 0.2", 0)])) == 2


def test_a_line_waits_for_its_window_and_no_longer() -> None:
    shown: list[str] = []
    folder = LineFolder(3, 1.0, shown.append)
    folder.feed(0, "a", 10.0)
    folder.feed(1, "a", 10.9)
    folder.flush(10.99)
    assert shown == []
    folder.flush(11.0)
    assert shown == ["[ranks 0-1] a"]
    folder.feed(2, "a", 11.1)
    folder.flush(12.2)
    assert shown[1:] == ["[rank 2] a"]


def test_a_line_of_all_ranks_does_not_wait() -> None:
    shown: list[str] = []
    folder = LineFolder(2, 1.0, shown.append)
    folder.feed(0, "a", 0.0)
    folder.feed(1, "a", 0.0)
    assert shown == ["[ranks 0-1] a"]


def test_one_rank_has_no_labels() -> None:
    assert fold(1, [(0, "a", 0), (0, "a", 0)]) == ["a", "a"]


def test_lines_of_a_rank_that_stand_between_do_not_hinder_folding() -> None:
    fed = [(1, "I am 1", 0.0), (1, "a", 0.0), (0, "I am 0", 0.0), (0, "a", 0.0)]
    assert fold(2, fed) == ["[rank 1] I am 1", "[ranks 0-1] a", "[rank 0] I am 0"]


def test_a_text_said_twice_is_folded_in_order() -> None:
    fed = [(0, "a", 0.0), (0, "b", 0.0), (0, "a", 0.0), (1, "a", 0.0), (1, "b", 0.0), (1, "a", 0.0)]
    assert fold(2, fed) == ["[ranks 0-1] a", "[ranks 0-1] b", "[ranks 0-1] a"]


def test_a_late_copy_of_a_warning_is_not_shown_again() -> None:
    warning = "2026-11-22 15:00:01,123 WARNING slow disk"
    fed = [(0, warning, 0.0), (1, warning, 5.0), (2, warning, 90.0), (2, "go", 91.0)]
    assert fold(3, fed) == [f"[rank 0] {warning}", "[rank 2] go"]
    python = ["/x.py:3: UserWarning: old", "  warnings.warn('old')", "  step"]
    fed = [(rank, line, 9.0 * rank) for rank in range(3) for line in python]
    assert fold(3, fed) == [
        f"[rank 0] {python[0]}",
        f"[rank 0] {python[1]}",
        *(f"[rank {rank}] {python[2]}" for rank in range(3)),
    ]


def test_a_ranks_second_warning_and_late_errors_are_shown() -> None:
    for line in ("WARNING slow", "ERROR lost"):
        again = [(0, line, 0.0), (0, line, 5.0)]
        assert len(fold(2, again)) == 2
    assert len(fold(2, [(0, "ERROR lost", 0.0), (1, "ERROR lost", 5.0)])) == 2


LINES = st.sampled_from(
    ["a", "b", "2026-11-22 15:00:01,123 a", "2026-11-22 15:00:02,456 b", "", "é"]
)
FED = st.lists(st.tuples(st.integers(0, 3), LINES, st.floats(0, 0.7)), max_size=60)


@given(FED)
def test_no_line_is_lost_or_invented(steps: list[tuple[int, str, float]]) -> None:
    now, fed = 0.0, []
    for rank, line, step in steps:
        now += step
        fed.append((rank, line, now))
    shown = [parse(line) for line in fold(4, fed)]
    for rank in range(4):
        wrote = [line[24:] if line.startswith("2026") else line for r, line, _ in fed if r == rank]
        read = [line[24:] if line.startswith("2026") else line for r, line in shown if rank in r]
        assert sorted(read) == sorted(wrote)
    assert {line for _, line in shown} <= {line for _, line, _ in fed}


def test_many_lines_at_once_take_little_time_and_memory() -> None:
    shown: list[str] = []
    folder = LineFolder(4, 1.0, shown.append)
    for turn in range(20):
        for rank in range(4):
            for k in range(500):
                folder.feed(rank, "same" if k % 2 else f"{turn} {k} {rank if k % 3 else ''}", 0.0)
    folder.flush(float("inf"))
    assert sum(len(parse(line)[0]) for line in shown) == 20 * 4 * 500
