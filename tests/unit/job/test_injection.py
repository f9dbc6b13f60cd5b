"""Reading `--inject`, and on whose collectives it acts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from dtrain.job.faults import KINDS, Injection, parse_injection
from dtrain.train.checks import collective_trace


def test_a_fault_in_full() -> None:
    text = "rank=1,step=5,kind=flip-gradient-bit,param=first.weight,element=3,bit=7"
    assert parse_injection(text) == Injection("flip-gradient-bit", 1, 5, "first.weight", 3, 7)
    assert parse_injection("kind=lr, rank=0") == Injection("lr", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_named(kind: str) -> None:
    assert parse_injection(f"rank=0,kind={kind}").kind == kind


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rank=1,step=5,kind=flip-gradiant-bit", "'flip-gradient-bit'"),
        ("rank=1,step=5", "^kind missing"),
        ("", "'' .*NAME=VALUE"),
        ("rank=one,kind=lr", "rank=one"),
        ("rank=1,kind=lr,when=5", "'when' .*kind, rank, step"),
        ("rank=1,kind=lr,step=0", "from 1$"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_injection(text)


HOME, LIBRARIES, OURS = "/home/me", collective_trace._LIBRARIES, collective_trace._PACKAGE


@pytest.mark.parametrize(
    ("files", "site", "users"),
    [
        ([f"{HOME}/a/task.py"], "a/task.py:1", True),
        (
            [f"{HOME}/a/task.py", f"{LIBRARIES}torchmetrics/metric.py"],
            "a/task.py:1, in torchmetrics/metric.py:1",
            True,
        ),
        (
            [f"{HOME}/a/run.py", f"{OURS}train/native.py", f"{LIBRARIES}lightning/trainer.py"],
            "lightning/trainer.py:1",
            False,
        ),
        ([f"{HOME}/a/run.py", f"{OURS}train/native.py"], "train/native.py:1", False),
    ],
)
def test_who_called_a_collective(files: list[str], site: str, users: bool) -> None:
    """Each file calls the next; torch's own would come last."""
    look: Callable[[], Any] = lambda: collective_trace._caller(sys._getframe(1))  # noqa: E731
    for file in reversed(files):
        named: dict[str, Any] = {"next_one": look}
        exec(compile("def here(): return next_one()", file, "exec"), named)
        look = named["here"]
    assert look() == (site, users)
