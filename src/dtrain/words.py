"""Lists in messages: the first of several things, and how many more there are."""

from __future__ import annotations

from collections.abc import Iterable


def few(items: Iterable[object], most: int = 4, *, sep: str = ", ") -> str:
    """The first of them: `3, 2, 2, 1 and 4 more`."""
    given = list(items)
    texts = (f"{item:.4g}" if isinstance(item, float) else str(item) for item in given[:most])
    more = f" and {len(given) - most} more" if len(given) > most else ""
    return sep.join(texts) + more


def numbered(noun: str, which: Iterable[object], most: int = 12) -> str:
    """Things by their numbers or names: `rank 1`, or `ranks 1, 2`."""
    listed = list(which)
    return f"{noun}{'s' if len(listed) > 1 else ''} {few(listed, most)}"
