"""Lists of nodes as Slurm writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product


def expand(nodelist: str) -> Iterator[str]:
    """The names in a list as Slurm writes it: `gpu[1,03-05]-ib,login`, in order."""
    for group in _split(nodelist):
        parts = re.split(r"\[([^\]]*)\]", group)  # text and ranges in turn
        choices = [_ranges(part) if odd % 2 else [part] for odd, part in enumerate(parts)]
        for chosen in product(*choices):
            yield "".join(chosen)


def _split(nodelist: str) -> list[str]:
    """Cut at commas that stand outside of brackets."""
    return [part for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist) if part]


def _ranges(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash:
            found += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            found.append(part)
    return found
