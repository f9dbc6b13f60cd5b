"""Numbers and lists in messages."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str, plural: str = "", *, least: int | None = None) -> str:
    """Return a number with its noun, for example `1 rank`, or `1 to 2 ranks` with least=1."""
    before = "" if least in (None, number) else f"{least} to "
    return f"{before}{number} {noun if number == 1 else plural or f'{noun}s'}"


def few(items: Iterable[object], most: int = 4, *, sep: str = ", ") -> str:
    """Return the first items as text, for example `3, 2, 2, 1 and 4 more`."""
    given = list(items)
    texts = (f"{item:.4g}" if isinstance(item, float) else str(item) for item in given[:most])
    more = f" and {len(given) - most} more" if len(given) > most else ""
    return sep.join(texts) + more


def numbered(noun: str, which: Iterable[object], most: int = 12) -> str:
    """Return a noun with numbers or names, for example `rank 1` or `ranks 1, 2`."""
    listed = list(which)
    return f"{noun}{'s' if len(listed) > 1 else ''} {few(listed, most)}"


def size(number: int) -> str:
    """Return a number of bytes for people, for example `1.2 MB`."""
    value, units = float(number), ["kB", "MB", "GB", "TB"]
    if value < 1000:
        return f"{number} B"
    while value >= 999.95 and units:
        value, unit = value / 1000, units.pop(0)
    return f"{value:.1f} {unit}"
