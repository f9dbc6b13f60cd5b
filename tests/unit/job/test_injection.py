"""Reading `--inject`, and on whose collectives it acts."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from dtrain.job.injection import KINDS, Injection, parse_injection
from dtrain.train.checks import chain


def test_a_fault_in_full() -> None:
    text = "rank=1,step=5,kind=flip-gradient-bit,param=first.weight,element=3,bit=7"
    assert parse_injection(text) == Injection("flip-gradient-bit", 1, 5, "first.weight", 3, 7)
    assert parse_injection("kind=lr, rank=0") == Injection("lr", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_named(kind: str) -> None:
    assert parse_injection(f"rank=0,kind={kind}").kind == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank=1,step=5,kind=flip-gradiant-bit", "did you mean 'flip-gradient-bit'?"),
        ("rank=1,step=5", "kind missing"),
        ("", "is not NAME=VALUE"),
        ("rank=one,kind=lr", "rank=one is not a whole number from 0 on"),
        ("rank=1,kind=lr,when=5", "'when' is unknown; known: kind, rank, step"),
        ("rank=1,kind=lr,step=0", "steps are counted from 1"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_injection(text)


@pytest.mark.parametrize(("folder", "users"), [("/home/me", True), (chain._LIBRARIES, False)])
def test_a_collective_of_a_library_is_not_the_tasks(folder: str, users: bool) -> None:
    found: dict[str, Any] = {"look": chain._caller, "sys": sys}
    exec(compile("told = look(sys._getframe())", f"{folder}/lightning/trainer.py", "exec"), found)
    assert found["told"] == ("lightning/trainer.py:1", users)
