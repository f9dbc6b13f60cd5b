"""Tables of text, with right-aligned numbers."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.errors import shortened

_NARROWEST = 16


def lines(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, *, left: int = 1
) -> list[str]:
    """Return the lines of a table.

    Args:
        heads: the headings.
        rows: the cells of each row.
        width: the columns that a line may have. None means any number. If there are too few, the
            first cells are shortened.
        left: how many columns are aligned to the left; the others are numbers.
    """
    table = [list(heads), *map(list, rows)]
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    if width is not None:
        excess = sum(sizes) + 2 * (len(sizes) - 1) - width
        sizes[0] = min(sizes[0], max(_NARROWEST, sizes[0] - excess))
    for cells in table:
        cells[0] = shortened(cells[0], sizes[0])
    return [
        "  ".join(
            cell.ljust(size) if index < left else cell.rjust(size)
            for index, (cell, size) in enumerate(zip(cells, sizes, strict=True))
        ).rstrip()
        for cells in table
    ]
