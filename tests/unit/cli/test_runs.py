"""The table of runs: what it shows, and what it leaves out where there is no room."""

from __future__ import annotations

from typing import Any

import pytest

from dtrain.cli.runs import table
from dtrain.cli.status import steps

SET = {"args.lr": 0.01, "strategy": "ddp", "train.epochs": 100, "args.name": "a long name of it"}


def row(**more: Any) -> dict[str, Any]:
    return {
        "id": "digits-abc234",
        "state": "succeeded",
        "step": 48,
        "total_steps": 48,
        "world_size": 4,
        "strategy": "ddp",
        "launcher": "local",
        "started": 1.7e9,
        "duration": 3725.4,
        "train": {"loss": 0.5, "lr": 0.1},
        "eval": {"accuracy": 0.98333, "loss": 0.1},
        "set": SET,
        **more,
    }


def test_all_of_it_where_there_is_room() -> None:
    heads, line, running, damaged = table(
        [
            row(),
            row(state="running", step=12, eval={}, set={}),
            {**dict.fromkeys(row()), "id": "x", "state": "damaged", "set": {}, "train": {}},
        ],
        None,
    )
    assert heads.split() == [
        "RUN", "STATE", "STEP", "RANKS", "STRATEGY", "LAUNCHER", "STARTED", "DURATION", "METRIC",
        "SET",
    ]  # fmt: skip
    assert line.split()[:6] == ["digits-abc234", "succeeded", "48", "4", "ddp", "local"]
    # what has a column of its own is not said again
    told = "1:02:05   accuracy 0.9833  args.lr=0.01 train.epochs=100 args.name=a long name of it"
    assert line.endswith(told)
    assert " 12/48 " in running
    assert " loss 0.5 " in running
    assert running.endswith("-")
    assert damaged.split()[:3] == ["x", "damaged", "-"]


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (200, []),
        (124, []),
        (120, ["LAUNCHER"]),
        (110, ["LAUNCHER", "STRATEGY"]),
        (80, ["LAUNCHER", "RANKS", "STARTED", "STRATEGY"]),
        (60, ["LAUNCHER", "RANKS", "SET", "STARTED", "STRATEGY"]),
    ],
)
def test_a_narrow_terminal_has_fewer_columns(width: int, left_out: list[str]) -> None:
    lines = table([row(), row(id="tiny-234abc", set={})], width)
    assert max(map(len, lines)) <= width
    shown = lines[0].split()
    assert sorted({*table([row()], None)[0].split()} - {*shown}) == left_out
    if "SET" in shown:
        assert "args.lr=0.01" in lines[1]
        assert lines[1].endswith("…" if width < 200 else "of it")


def test_steps_with_their_share() -> None:
    assert steps({"step": 20, "total_steps": 48, "percent": 41}) == "20 of 48 (41 %)"
    assert steps({"step": 20, "total_steps": None, "percent": None}) == "20"
