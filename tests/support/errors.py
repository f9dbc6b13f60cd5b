"""Errors that are expected: by their code and by what they must name, not by their sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dtrain.errors import DtrainError
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
    missing = [name for name in names if name not in str(error)]
    assert not missing, str(error)
