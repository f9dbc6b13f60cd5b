"""Expect errors by code, place and named values. tests/golden/messages.txt has the sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from dtrain.errors import DtrainError, Problem
from dtrain.testing.calls import RankError


@contextmanager
def raises(
    code: str, *names: str, kind: type[DtrainError] = DtrainError
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error of dtrain, in this process or in a rank of `run_ranks`.

    Args:
        code: its code.
        names: what its message must have: places, flags, numbers, names. Whole sentences are
            asserted in tests/golden/messages.txt.
        kind: the class of the error, or one that it derives from.

    Yields:
        What holds the error afterwards.
    """
    with pytest.raises((kind, RankError)) as caught:
        yield caught
    error = caught.value.__cause__ if isinstance(caught.value, RankError) else caught.value
    assert isinstance(error, kind), error
    assert error.code == code, str(error)
    assert_named(str(error), names)


def assert_problems(problems: Sequence[Problem], *expected: tuple[str, ...]) -> None:
    """Assert that these are the problems: all of them, and in this sequence.

    Args:
        problems: those of a JobError.
        expected: of each problem its code, its place and field (`job.yaml:3:11: train.steps`), and
            what its message must name.
    """
    found = [(problem.code, place_of(problem)) for problem in problems]
    assert found == [each[:2] for each in expected], [str(problem) for problem in problems]
    for problem, (_, _, *names) in zip(problems, expected, strict=True):
        assert_named(problem.message, names)


def place_of(problem: Problem) -> str:
    """Return the place and the field of a problem, as shown before its message."""
    return str(replace(problem, message="")).removesuffix(": ")


def assert_named(message: str, names: Sequence[str]) -> None:
    """Assert that a message has all of these names and values."""
    assert not [name for name in names if name not in message], message


def assert_shown(output: str, code: str, *names: str) -> None:
    """Assert that a command shows an error of dtrain, and no traceback.

    Args:
        output: what the command printed.
        code: the error's code, which is shown in brackets.
        names: what must be shown too: places, flags, numbers, names.
    """
    assert_named(output, [f"  [{code}]", *names])
    assert "Traceback" not in output, output
