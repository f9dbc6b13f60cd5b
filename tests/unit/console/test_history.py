"""Logs merged by time."""

from __future__ import annotations

from pathlib import Path

from dtrain.console.history import merged


def test_lines_are_merged_by_their_times(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text(
        "2026-11-22 10:00:00,100 INFO a\n  more of a\n2026-11-22 10:00:00,300 INFO c\n"
    )
    second.write_text("2026-11-22 10:00:00,200 INFO b\n2026-99-22 10:00:00,400 INFO d")
    lines = [(rank, line.split()[-1]) for _, rank, line in merged({0: first, 1: second})]
    assert lines == [(0, "a"), (0, "a"), (1, "b"), (1, "d"), (0, "c")]


def test_lines_before_any_time_come_first(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello \xff\n2026-11-22 10:00:00,100 INFO a\n")
    assert [when == 0 for when, _, _ in merged({0: tmp_path / "a"})] == [True, False]
    assert list(merged({})) == []
