"""How the states in two checkpoints differ. Tensors are compared in pieces of 1 MiB."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.checkpoints.contents import Contents
from dtrain.checkpoints.elements import different, distance
from dtrain.train.checkpoint.headers import Bytes, StoredBytes


@dataclass
class Difference:
    """How the elements of a tensor differ, which has the same type and shape in both."""

    name: str
    elements: int
    """The number of all elements."""
    different: int = 0
    """The number of elements with other bits."""
    largest: float = 0.0
    """The largest difference of two values. Infinite if only one of them is finite."""
    relative: float = 0.0
    """The largest difference as a fraction of the larger of the two values."""
    nan: tuple[int, int] = (0, 0)
    """The numbers of NaNs in both, among the elements that differ."""


@dataclass
class Differences:
    """The result of a comparison."""

    only: tuple[list[str], list[str]]
    """The names that only the first, and only the second has."""
    other_kind: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The types and shapes of tensors where they differ, by name."""
    tensors: list[Difference] = field(default_factory=list)
    """The tensors whose elements differ, the largest difference first."""
    values: list[str] = field(default_factory=list)
    """The names of other state that differs."""
    same: int = 0
    """The number of tensors that are the same, bit for bit."""

    @property
    def are_same(self) -> bool:
        return not (any(self.only) or self.other_kind or self.tensors or self.values)


def compare(one: Contents, other: Contents, *, everything: bool) -> Differences:
    """Compare the models of two checkpoints; or everything, also state that is no tensor.

    Raises:
        CheckpointError: a byte that is read is damaged.
    """
    mine, others = (each.tensors(everything=everything) for each in (one, other))
    values, other_values = (each.values(everything=everything) for each in (one, other))
    found = Differences(_only({**mine, **values}, {**others, **other_values}))
    for name in (each for each in mine if each in others):
        a, b = mine[name], others[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.other_kind[name] = (kind_of(a), kind_of(b))
        elif (difference := _compared(name, a, b)) is None:
            found.same += 1
        else:
            found.tensors.append(difference)
    found.tensors.sort(key=lambda each: (-each.largest, each.name))
    shared = (name for name in values if name in other_values)
    found.values = [name for name in shared if values[name] != other_values[name]]
    return found


def _only(one: Mapping[str, object], other: Mapping[str, object]) -> tuple[list[str], list[str]]:
    return [n for n in one if n not in other], [n for n in other if n not in one]


def kind_of(tensor: StoredBytes) -> str:
    """Return the type and shape of a tensor, for example `float32 [10, 4]`."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def _compared(name: str, one: StoredBytes, other: StoredBytes) -> Difference | None:
    """Return how two tensors of one type and shape differ. None if they do not."""
    if one.layout == other.layout:  # the digests of the same boxes of the live tensors
        return None
    found = Difference(name, math.prod(one.shape))
    for a, b in zip(one.pieces(), other.pieces(), strict=True):
        _add(found, one, a, b)
    return found if found.different else None


def _add(found: Difference, tensor: StoredBytes, one: Bytes, other: Bytes) -> None:
    """Add the differences of two pieces."""
    mask = different(tensor.itemsize, one, other)
    number = int(mask.sum())
    if number == 0:
        return
    a, b = (each.reshape(-1, tensor.itemsize)[mask].reshape(-1) for each in (one, other))
    apart = distance(tensor.dtype, a, b)
    found.different += number
    found.largest = max(found.largest, apart.largest)
    found.relative = max(found.relative, apart.relative)
    found.nan = (found.nan[0] + apart.nan[0], found.nan[1] + apart.nan[1])
