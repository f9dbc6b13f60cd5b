"""Errors that are expected: by their code and by what they must name, not by their sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dtrain.errors import DtrainError


@contextmanager
def raises(code: str, *names: str) -> Iterator[pytest.ExceptionInfo[DtrainError]]:
    """Expect an error of dtrain.

    Args:
        code: its code.
        names: what its message must have: places, flags, numbers, names. Whole sentences are
            asserted in tests/golden/messages.txt.
    """
    with pytest.raises(DtrainError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    missing = [name for name in names if name not in str(caught.value)]
    assert not missing, str(caught.value)
