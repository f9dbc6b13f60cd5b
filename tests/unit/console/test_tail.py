from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.console import tail
from dtrain.console.tail import Follower

Append = Callable[[str, bytes], None]


@pytest.fixture
def append(tmp_path: Path) -> Append:
    def append(name: str, raw: bytes) -> None:
        with (tmp_path / name).open("ab") as file:
            file.write(raw)

    return append


def test_files_that_come_later_and_grow(tmp_path: Path, append: Append) -> None:
    follower: Follower[str] = Follower()
    for name in ("one", "two"):
        follower.add(name, tmp_path / name)
    assert list(follower.poll()) == []
    append("one", b"a\nb")
    assert list(follower.poll()) == [("one", "a")]
    assert list(follower.poll()) == []
    append("one", b"c\n")
    append("two", b"x\n\n")
    assert list(follower.poll()) == [("one", "bc"), ("two", "x"), ("two", "")]
    append("two", b"half")
    append("one", b"whole\nend")
    rest = [("one", "whole"), ("one", "end"), ("two", "half")]
    assert list(follower.finish()) == rest
    assert list(follower.finish()) == []


def test_nothing_is_stripped_and_any_bytes_are_read(tmp_path: Path, append: Append) -> None:
    follower: Follower[int] = Follower()
    follower.add(0, tmp_path / "log")
    append("log", "  é\t \r\n10%\r20%\r\n".encode() + b"\xff\xc3\n\x00\n")
    assert [line for _, line in follower.poll()] == ["  é\t \r", "10%\r20%\r", "��", "\x00"]
    append("log", "é".encode()[:1])
    assert list(follower.poll()) == []
    append("log", "é".encode()[1:] + b"\n")
    assert list(follower.poll()) == [(0, "é")]


def test_skipping_what_is_there(tmp_path: Path, append: Append) -> None:
    follower: Follower[str] = Follower()
    append("log", b"old\n")
    follower.add("log", tmp_path / "log")
    follower.add("none", tmp_path / "none")
    follower.skip_to_end()
    append("log", b"new\n")
    append("none", b"first\n")
    assert list(follower.poll()) == [("log", "new"), ("none", "first")]


def test_a_file_that_was_cut_is_read_from_its_new_beginning(tmp_path: Path, append: Append) -> None:
    follower: Follower[str] = Follower()
    follower.add("log", tmp_path / "log")
    append("log", b"one\ntwo\nthr")
    assert len(list(follower.poll())) == 2
    (tmp_path / "log").write_bytes(b"new\n")
    assert list(follower.poll()) == [("log", "new")]


def test_files_take_turns(tmp_path: Path, append: Append, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_CHUNK", 4)
    follower: Follower[int] = Follower()
    for rank in range(2):
        append(str(rank), b"a\nb\nc\nd\n")
        follower.add(rank, tmp_path / str(rank))
    assert [rank for rank, _ in follower.poll()] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_a_writer_that_never_stops_does_not_hold_us(tmp_path: Path, append: Append) -> None:
    follower: Follower[str] = Follower()
    follower.add("log", tmp_path / "log")
    append("log", b"0\n")
    seen = 0
    for _, line in follower.poll():
        seen += 1
        append("log", f"{line}0\n".encode())
    assert seen == 1
    assert list(follower.poll()) == [("log", "00")]


def test_an_endless_line_is_cut_to_bound_memory(
    tmp_path: Path, append: Append, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "_LONGEST_LINE", 10)
    monkeypatch.setattr(tail, "_CHUNK", 4)
    follower: Follower[str] = Follower()
    follower.add("log", tmp_path / "log")
    append("log", b"x" * 100 + b"\n")
    lines = [line for _, line in follower.poll()]
    assert "".join(lines) == "x" * 100
    assert max(map(len, lines)) <= 14


@pytest.mark.parametrize("name", ["with space", "quo'te\"", "semi;colon", "new\nline", "*"])
def test_hostile_names(tmp_path: Path, append: Append, name: str) -> None:
    follower: Follower[str] = Follower()
    follower.add(name, tmp_path / name)
    append(name, b"a\n")
    assert list(follower.poll()) == [(name, "a")]


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    follower: Follower[str] = Follower()
    follower.add("folder", tmp_path / "folder")
    follower.add("below", tmp_path / "folder" / "x" / "y")
    assert list(follower.finish()) == []


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50
)
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 2), st.binary(max_size=6) | st.just(b"\n"), st.booleans()),
        max_size=20,
    ),
    chunk=st.integers(1, 5),
)
def test_no_line_is_lost_and_none_invented(
    tmp_path: Path, pieces: list[tuple[int, bytes, bool]], chunk: int
) -> None:
    follower: Follower[int] = Follower()
    wrote = {rank: b"" for rank in range(3)}
    read: dict[int, list[str]] = {rank: [] for rank in range(3)}
    for rank in range(3):
        (tmp_path / str(rank)).unlink(missing_ok=True)
        follower.add(rank, tmp_path / str(rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "_CHUNK", chunk)
        for rank, raw, poll_now in pieces:
            with (tmp_path / str(rank)).open("ab") as file:
                file.write(raw)
            wrote[rank] += raw
            for key, line in follower.poll() if poll_now else ():
                read[key].append(line)
        for key, line in follower.finish():
            read[key].append(line)
    for rank, raw in wrote.items():
        *whole, last = raw.split(b"\n")
        lines = [*whole, last] if last else whole
        assert read[rank] == [line.decode(errors="replace") for line in lines]


def test_of_many_files_all_have_their_turn(
    tmp_path: Path, append: Append, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "_FILES_A_POLL", 4)
    follower: Follower[int] = Follower()
    for number in range(9):
        follower.add(number, tmp_path / str(number))
        append(str(number), b"a\n")
    seen = [[number for number, _ in follower.poll()] for _ in range(3)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    append("0", b"b\n")
    append("8", b"b\n")
    assert [number for number, _ in follower.poll()] == [0]
    assert list(follower.finish()) == [(8, "b")]
