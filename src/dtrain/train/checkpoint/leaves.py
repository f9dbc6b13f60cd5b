"""State that belongs to neither a model nor an optimizer: trees of tensors and plain values.

A tree holds only values that `read` can read. Its leaves have names, for example
`teacher['first.weight']`.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.errors import CheckpointError, DtrainError

_PLAIN = (bool, int, float, str, type(None))
"""Exactly these types: a subclass is pickled as something else."""
NUMPY = [
    *(np.ndarray, np.dtype, np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"},
]
"""The types that a file with NumPy's numbers, texts and arrays refers to."""

_MISFIT = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError)

Change = Callable[[str, Any], Any]


def read(source: Path | io.BytesIO) -> Any:
    """Read a file of `torch.save` to the CPU; only tensors, arrays and plain values are built."""
    with torch.serialization.safe_globals(NUMPY):
        return torch.load(source, map_location="cpu", weights_only=True)


def refuse_unreadable(value: Any, name: str, *, parts: bool = False) -> None:
    """Make sure that `read` will return a value that is to be saved, with the same types.

    Args:
        value: a tree; plain tensors in it are not checked.
        name: the name of the tree, for messages.
        parts: whether sharded tensors are allowed, because each rank saves its part.

    Raises:
        DtrainError: `read` could not return the value. The message names the leaf.
    """
    if type(value) in _PLAIN or type(value) in (torch.Tensor, torch.nn.Parameter):
        return
    if type(value) in (dict, OrderedDict):
        for key, each in value.items():
            if type(key) not in _PLAIN and not _is_readable(key):
                raise _cannot_hold_key(name, key)
            refuse_unreadable(each, f"{name}[{key!r}]", parts=parts)
    elif type(value) in (list, tuple):
        for index, each in enumerate(value):
            refuse_unreadable(each, f"{name}[{index}]", parts=parts)
    elif hasattr(value, "full_tensor"):
        if not parts:
            raise _is_a_part(name)
    elif not _is_readable(value):
        raise _cannot_hold(name, value)


@contextmanager
def restoring(owner: str) -> Iterator[None]:
    """Turn errors of a `load_state_dict` into a `CheckpointError` that names the owner."""
    try:
        yield
    except _MISFIT as error:
        raise CheckpointError(
            f"{owner} cannot load its state: {error!r}", code="checkpoint.state-refused"
        ) from error


def plain(value: Any, name: str) -> Any:
    """Return a copy of the tree with new containers and the same tensors, detached.

    Raises:
        DtrainError: a checkpoint cannot hold a leaf. The message names it.
    """
    return changed(value, name, _checked)


def changed(value: Any, name: str, change: Change) -> Any:
    """Return a tree in which each leaf is replaced by `change(name of the leaf, leaf)`."""
    if type(value) in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise _cannot_hold_key(name, key)
        return {key: changed(each, f"{name}[{key!r}]", change) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(changed(each, f"{name}[{i}]", change) for i, each in enumerate(value))
    return change(name, value)


def leaves(value: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    changed(value, name, found.__setitem__)
    return found


def _checked(name: str, leaf: Any) -> Any:
    if type(leaf) in _PLAIN:
        return leaf
    if not isinstance(leaf, torch.Tensor):
        # ranks are compared by the bytes that are written, and sets have no order
        if isinstance(leaf, set) or not _is_readable(leaf):
            raise _cannot_hold(name, leaf)
        return leaf
    tensor = leaf.detach()
    if hasattr(tensor, "full_tensor"):
        raise _is_a_part(name)
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        raise DtrainError(
            f"{name} is a {type(tensor).__name__} of layout {tensor.layout}; a "
            "checkpoint takes plain dense tensors",
            code="checkpoint.unsaveable-value",
        )
    return tensor


def _is_readable(leaf: Any) -> bool:
    """Return whether a leaf keeps its type when it is saved and read; it is tried."""
    file = io.BytesIO()
    try:
        torch.save(leaf, file)
        file.seek(0)
        return type(read(file)) is type(leaf)
    except Exception:  # a user's object may raise anything when it is saved
        return False


def _is_a_part(name: str) -> DtrainError:
    return DtrainError(
        f"{name} is one rank's part of a tensor that strategy 'fsdp' has sharded. Leave out the "
        "model's own parameters: a checkpoint holds them anyway. For a copy of a parameter, save "
        "its .full_tensor(), which all ranks must call together",
        code="checkpoint.part-of-tensor",
    )


def _cannot_hold_key(name: str, key: Any) -> DtrainError:
    return DtrainError(
        f"{name} has a key {key!r}; keys in a checkpoint must be str or int",
        code="checkpoint.unsaveable-key",
    )


def _cannot_hold(name: str, leaf: Any) -> DtrainError:
    kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
    return DtrainError(
        f"{name} is a {kind}, which a checkpoint cannot hold. It can hold tensors, NumPy's arrays "
        "and numbers, Python's numbers, str and None, in dicts, lists and tuples. Save the "
        "state_dict() of an object, and a list instead of a set",
        code="checkpoint.unsaveable-value",
    )
