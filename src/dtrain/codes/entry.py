"""What is known of one code."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    cause: str
    """What is wrong, in one or two sentences."""
    cure: str
    """What to do about it."""
