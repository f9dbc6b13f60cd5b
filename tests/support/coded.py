"""Expect an error by its code, and by what matters of its message: numbers, ranks and names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dtrain.errors import DtrainError
from dtrain.testing.calls import RankError


@contextmanager
def refused(
    code: str, *parts: str, kind: type[DtrainError] = DtrainError
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error of dtrain, in this process or in a rank of `run_ranks`.

    Args:
        code: of the error.
        parts: what its message contains, line breaks and all.
        kind: the class of the error, or one that it derives from.

    Yields:
        What holds the error afterwards.
    """
    with pytest.raises((kind, RankError)) as caught:
        yield caught
    error = caught.value.__cause__ if isinstance(caught.value, RankError) else caught.value
    assert isinstance(error, kind), error
    assert error.code == code
    for part in parts:
        assert part in str(error)
