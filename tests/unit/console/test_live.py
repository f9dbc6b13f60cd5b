"""What of rank 0's log a terminal shows above its progress bar."""

from __future__ import annotations

import pytest

from dtrain.console import out
from dtrain.console.live import StepLines

BEGIN = "2026-01-02 03:04:05,678 "
LINE = f"{BEGIN}INFO dtrain.train.loop.reporting: "


def picked(*said: tuple[float, str]) -> list[str]:
    lines = StepLines()
    return [shown.removeprefix(LINE) for now, text in said for shown in lines.pick(text, now)]


def step(number: int, total: str = "48") -> str:
    return f"{LINE}step {number}/{total} epoch 0: loss 1"


def test_lines_of_steps_come_by_time() -> None:
    shown = picked(*((0.1 * number, step(number, "1000")) for number in range(1, 301)))
    assert [each.split()[1] for each in shown] == ["1/1000", "101/1000", "201/1000"]


def test_the_last_step_and_all_that_is_no_step_are_shown() -> None:
    shown = picked(
        (0.0, step(1)),
        (0.1, step(47)),
        (0.2, step(48)),
        (0.3, f"{LINE}evaluation after step 48: loss 1"),
        (0.4, f"{LINE}epoch 0 after step 48: train_loss 1"),
        (0.5, f"{LINE}finished: 48 steps, 1.0 s in this process"),
        (0.6, "a line that a task prints: step 3/48 "),
    )
    assert [each.split(":")[0] for each in shown] == [
        "step 1/48 epoch 0",
        "step 48/48 epoch 0",
        "evaluation after step 48",
        "epoch 0 after step 48",
        "finished",
        "a line that a task prints",
    ]


def test_the_last_step_of_a_training_whose_end_nobody_knew() -> None:
    left = f"{BEGIN}WARNING dtrain.train.loop.reporting: stopping after step 9: SIGTERM (on rank 0)"
    shown = picked((0.0, step(1, "?")), (0.1, step(8, "?")), (0.2, step(9, "?")), (0.3, left))
    assert [each.split(":")[0] for each in shown[:2]] == ["step 1/? epoch 0", "step 9/? epoch 0"]
    assert shown[2:] == [left]


@pytest.mark.parametrize(
    ("variable", "value", "terminal", "is_coloured"),
    [
        ("LANG", "C", True, True),
        ("LANG", "C", False, False),
        ("NO_COLOR", "1", True, False),
        ("NO_COLOR", "", True, True),
        ("TERM", "dumb", True, False),
    ],
)
def test_colours_are_for_terminals_that_show_them(
    variable: str,
    value: str,
    terminal: bool,
    is_coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert out.paint("failed", "red") == ("\x1b[31mfailed\x1b[0m" if is_coloured else "failed")
    assert out.paint("prepared", None) == "prepared"
