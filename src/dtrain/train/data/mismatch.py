"""The reason why samples do not make a batch: the first two that differ in their structure."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dtrain.train.data.content import Leaf, leaves

_BY_VALUE = ("int", "float", "complex", "bool", "str", "bytes", "NoneType")
"""The kinds of leaves whose values may differ between samples."""


def note_samples(error: Exception, rows: Sequence[Any], names: Sequence[str]) -> None:
    """Add a note to an error of `collate` if different samples may be its cause."""
    stacks = "stack expects" in str(error) or any(
        frame.filename.endswith("torch/utils/data/_utils/collate.py")
        for frame in traceback.extract_tb(error.__traceback__)
    )
    if any(row is None for row in rows) or stacks:
        found = _first_mismatch(rows, names)
        if found:
            error.add_note(found)


def _first_mismatch(rows: Sequence[Any], names: Sequence[str]) -> str:
    """Return for example `sample 13 has float32[2] at ['x'], and sample 12 float32[3]`.

    The text is empty if the samples have the same structure.
    """
    if all(row is None for row in rows):
        return f"{names[0]} is None: does the data set return the sample?"
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
    """Return the path and the kind of a leaf, without its value."""
    if leaf.kind == "NoneType":
        return leaf.path, "None"
    if leaf.kind == "key":
        return leaf.path, f"the key {leaf.value!r}"
    if isinstance(leaf.value, list):
        return leaf.path, f"{leaf.kind} numbers"
    if leaf.kind not in _BY_VALUE and isinstance(leaf.value, int):
        return leaf.path, f"{leaf.kind} of {leaf.value}"
    return leaf.path, leaf.kind
