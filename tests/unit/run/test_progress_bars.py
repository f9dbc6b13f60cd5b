"""A bar that redraws its line is one line of the log."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from dtrain.run import progress_bars
from dtrain.run.progress_bars import BarStream, Screen


class Log(io.StringIO):
    """A stream into a screen, with what has come out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.screen, self.text, self.live = Screen(), "", list[str]()

    def write(self, text: str) -> int:
        self.text += self.screen.feed(text)
        self.live.append(self.screen.live)
        return len(text)

    def flush(self) -> None:
        self.text += self.screen.flush()

    def lines(self) -> list[str]:
        return (self.text + self.screen.finish() + self.screen.flush()).split("\n")


def bar(log: Log, name: str, **options: object) -> tqdm[int]:
    plain = "{desc} {n}/{total}"
    return tqdm(range(5), file=log, mininterval=0, desc=name, bar_format=plain, **options)


def one_after_another(log: Log) -> None:
    for epoch in range(2):
        for _ in bar(log, f"epoch {epoch}"):
            pass
        print("loss", epoch, file=log)


def without_a_line_between(log: Log) -> None:
    for epoch in range(2):
        for _ in bar(log, f"epoch {epoch}"):
            pass


def nested(log: Log) -> None:
    for epoch in bar(log, "epochs"):
        for _ in bar(log, f"epoch {epoch}"):
            pass


def nested_and_gone(log: Log) -> None:
    for epoch in bar(log, "epochs"):
        for step in bar(log, f"epoch {epoch}", leave=False):
            if step == 2 and epoch == 1:
                tqdm.write("by tqdm", file=log)
                print("by", "print", file=log)


def rewritten_by_hand(log: Log) -> None:
    for step in range(3):
        print(f"step {step}", end="\r", file=log)
    print("done", file=log)
    for step in range(3):
        print(f"\rstep {step}", end="", flush=True, file=log)
    print(file=log)


def with_backspaces(log: Log) -> None:
    print("at 10 %", end="", file=log)
    for step in (20, 30):
        print(f"\b\b\b\b{step} %", end="", file=log)
    print(file=log)


def coloured(log: Log) -> None:
    for step in range(3):
        print(f"\r\x1b[32mstep\x1b[0m {step}\x1b[K", end="", file=log)
    print(file=log)


def plain(log: Log) -> None:
    print("Loading … ", end="", flush=True, file=log)
    print("ok", file=log)
    log.write("by\r\nWindows\r\n")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (one_after_another, ["epoch 0 5/5", "loss 0", "epoch 1 5/5", "loss 1"]),
        (without_a_line_between, ["epoch 0 5/5", "epoch 1 5/5"]),
        (nested, [*(f"epoch {epoch} 5/5" for epoch in range(5)), "epochs 5/5"]),
        (nested_and_gone, ["by tqdm", "by print", "epochs 5/5"]),
        (rewritten_by_hand, ["done", "step 2"]),
        (with_backspaces, ["at 30 %"]),
        (coloured, ["step 2"]),
        (plain, ["Loading … ok", "by", "Windows"]),
    ],
)
def test_it_is_one_line(program: Callable[[Log], None], expected: list[str]) -> None:
    log = Log()
    program(log)
    assert log.lines() == [*expected, ""]


def test_what_is_being_drawn_is_known() -> None:
    log = Log()
    nested(log)
    assert "epochs 1/5\nepoch 1 3/5" in log.live
    assert max(live.count("\n") for live in log.live) < 3, "no bar that is complete is among them"


@given(st.lists(st.text("ab \n", max_size=6), max_size=20))
def test_plain_text_comes_as_it_was_written(parts: list[str]) -> None:
    log = Log()
    for part in parts:
        log.write(part)
    assert "\n".join(log.lines()) == "".join(parts)


@given(st.lists(st.text("ab\n\r\b\x1b[A1K ", max_size=8), max_size=30))
def test_any_text_is_taken(parts: list[str]) -> None:
    log = Log()
    for part in parts:
        log.write(part)
        assert "\r" not in log.text
    assert len(log.lines()) <= "".join(parts).count("\n") + "".join(parts).count("\x1b") + 2


def test_two_streams_share_a_screen_and_a_killed_rank_loses_no_bar(tmp_path: Path) -> None:
    log = tmp_path / "rank-00000.log"
    with log.open("ab") as file:
        raw = [io.TextIOWrapper(io.BufferedWriter(io.FileIO(file.fileno(), "ab", closefd=False)))
               for _ in range(2)]  # fmt: skip
        stdout = BarStream(raw[0], log)
        stderr = BarStream(raw[1], log, beside=stdout)
        for step in range(3):
            stderr.write(f"\rstep {step}")
        assert (log.read_text(), progress_bars.live(log)) == ("", "step 2")
        stderr.write("\n")
        print("epoch", 1, file=stdout)
        assert (log.read_text(), progress_bars.live(log)) == ("step 2\nepoch 1\n", "")
        threads = [
            threading.Thread(target=lambda at=at: [stdout.write(f"{at}\n") for _ in range(200)])
            for at in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stdout.finish()
        lines = log.read_text().splitlines()[2:]
        assert sorted(lines) == sorted(str(at) for at in range(4) for _ in range(200))
        stderr.write("\rkilled at 7")
    progress_bars.settle(log)
    assert log.read_text().endswith("\nkilled at 7\n")
    assert not progress_bars.live_file(log).exists()
    progress_bars.settle(log)
    assert log.read_text().count("killed") == 1
    assert sys.stdout is not stdout
