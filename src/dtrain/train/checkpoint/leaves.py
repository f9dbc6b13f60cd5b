"""State that is neither a model's nor an optimizer's: trees of tensors and plain values.

A tree holds what `torch.load(weights_only=True)` reads again: tensors, numbers, texts and None in
dicts, lists and tuples. Its leaves have names, as `teacher['first.weight']`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dtrain.errors import DtrainError

_PLAIN = (bool, int, float, str, type(None))
"""As they are: a subclass, such as NumPy's float64, is pickled as something else."""

Change = Callable[[str, Any], Any]


def plain(value: Any, name: str) -> Any:
    """A tree with containers of its own, and the same tensors without their graphs.

    Args:
        value: to be saved.
        name: whose it is.

    Raises:
        DtrainError: a checkpoint cannot hold it; names the leaf.
    """
    return changed(value, name, _checked)


def changed(value: Any, name: str, change: Change) -> Any:
    """A tree with other leaves: `change(name of the leaf, leaf)` of each."""
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise DtrainError(f"{name} has a key {key!r}; a checkpoint takes str and int")
        return {key: changed(each, f"{name}[{key!r}]", change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [changed(each, f"{name}[{i}]", change) for i, each in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return change(name, value)


def leaves(value: Any, name: str) -> dict[str, Any]:
    """All leaves of a tree, by name."""
    found: dict[str, Any] = {}
    changed(value, name, found.__setitem__)
    return found


def _checked(name: str, leaf: Any) -> Any:
    if type(leaf) in _PLAIN:
        return leaf
    if not isinstance(leaf, torch.Tensor):
        kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
        raise DtrainError(
            f"{name} is a {kind}, which a checkpoint cannot hold; it takes tensors, numbers, "
            "str and None, in dicts, lists and tuples (an array as torch.from_numpy(a), an "
            "object as its own state_dict())"
        )
    tensor = leaf.detach()
    if hasattr(tensor, "full_tensor"):
        raise DtrainError(
            f"{name} is one rank's part of a tensor that strategy 'fsdp' has cut; leave the "
            "model's own parameters out, a checkpoint holds them anyway"
        )
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        raise DtrainError(
            f"{name} is a {type(tensor).__name__} of layout {tensor.layout}; a "
            "checkpoint takes plain dense tensors"
        )
    return tensor
