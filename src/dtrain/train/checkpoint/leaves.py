"""State that is neither a model's nor an optimizer's: trees of tensors and plain values.

A tree holds what `read` reads again. Its leaves have names, as `teacher['first.weight']`.
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
"""As they are: a subclass is pickled as something else."""
NUMPY = [
    *(np.ndarray, np.dtype, np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"},
]
"""What NumPy's numbers and texts, and arrays of them, are made of in a file."""

_MISFIT = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError)

Change = Callable[[str, Any], Any]


def read(source: Path | io.BytesIO) -> Any:
    """What `torch.save` wrote, on the CPU; builds nothing but tensors, arrays and plain values."""
    with torch.serialization.safe_globals(NUMPY):
        return torch.load(source, map_location="cpu", weights_only=True)


def refuse_unreadable(value: Any, name: str, *, parts: bool = False) -> None:
    """Make sure that `read` gives back what is to be saved, with the same types.

    Args:
        value: a tree; plain tensors of it are not looked at.
        name: whose it is.
        parts: whether there may be a rank's parts of tensors, as what is saved is whole.

    Raises:
        DtrainError: it does not; names the leaf.
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
    """Around a `load_state_dict`: what it raises says that a checkpoint does not fit, and whom."""
    try:
        yield
    except _MISFIT as error:
        raise CheckpointError(
            f"{owner} cannot take its state back: {error!r}", code="checkpoint.state-refused"
        ) from error


def plain(value: Any, name: str) -> Any:
    """A tree with containers of its own, and the same tensors without their graphs.

    Raises:
        DtrainError: a checkpoint cannot hold it; names the leaf.
    """
    return changed(value, name, _checked)


def changed(value: Any, name: str, change: Change) -> Any:
    """A tree with other leaves: `change(name of the leaf, leaf)` of each."""
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
        # ranks are compared by what is written, and sets have no order
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
    """Whether it comes back as it is; by trying, as the reader knows best."""
    file = io.BytesIO()
    try:
        torch.save(leaf, file)
        file.seek(0)
        return type(read(file)) is type(leaf)
    except Exception:  # whatever saving somebody's object raises
        return False


def _is_a_part(name: str) -> DtrainError:
    return DtrainError(
        f"{name} is one rank's part of a tensor that strategy 'fsdp' has cut. Leave the model's "
        "own parameters out: a checkpoint holds them anyway. Of a copy, keep its .full_tensor(), "
        "which all ranks must call together",
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
        f"{name} is a {kind}, which a checkpoint cannot hold; it takes tensors, NumPy's arrays and "
        "numbers, numbers, str and None, in dicts, lists and tuples. Save the state_dict() of an "
        "object, and a list instead of a set",
        code="checkpoint.unsaveable-value",
    )
