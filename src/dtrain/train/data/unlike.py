"""Why samples do not make a batch: which two of them are unlike, and in what."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dtrain.train.data.content import Leaf, leaves

_BY_VALUE = ("int", "float", "complex", "bool", "str", "bytes", "NoneType")
"""Kinds of leaves whose value is the sample's own affair."""


def note_samples(error: Exception, rows: Sequence[Any], names: Sequence[str]) -> None:
    """Add to an error of `collate` what is not alike in its samples, where that may be why."""
    stacks = "stack expects" in str(error) or any(
        frame.filename.endswith("torch/utils/data/_utils/collate.py")
        for frame in traceback.extract_tb(error.__traceback__)
    )
    if any(row is None for row in rows) or stacks:
        found = _first_unlike(rows, names)
        if found:
            error.add_note(found)


def _first_unlike(rows: Sequence[Any], names: Sequence[str]) -> str:
    """`sample 13 has float32[2] at ['x'], and sample 12 float32[3]`; empty: they are alike."""
    if all(row is None for row in rows):
        return f"{names[0]} is None: does the data set return what it read?"
    shapes = [tuple(_shape(leaf) for leaf in leaves(row)) for row in rows]
    usual = Counter(shapes).most_common(1)[0][0]
    reference = shapes.index(usual)
    for name, shape in zip(names, shapes, strict=False):
        for mine, theirs in zip(shape, usual, strict=False):
            if mine != theirs:
                path, kind = mine
                where = f"has {kind} at {path}" if path else f"is {kind}"
                return f"{name} {where}, and {names[reference]} {theirs[1]}"
    return ""


def _shape(leaf: Leaf) -> tuple[str, str]:
    """Where a leaf is, and what it is, without its value."""
    if leaf.kind == "NoneType":
        return leaf.path, "None"
    if leaf.kind == "key":
        return leaf.path, f"the key {leaf.value!r}"
    if isinstance(leaf.value, list):
        return leaf.path, f"{leaf.kind} numbers"
    if leaf.kind not in _BY_VALUE and isinstance(leaf.value, int):
        return leaf.path, f"{leaf.kind} of {leaf.value}"
    return leaf.path, leaf.kind
