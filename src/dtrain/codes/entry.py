"""The entry of one code in docs/errors.md."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    cause: str
    """What is wrong, in one or two sentences."""
    remedy: str
    """What to do about it."""
