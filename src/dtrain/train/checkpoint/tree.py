"""A tree of state as JSON, with its tensors beside it.

A tensor becomes `{"$tensor": key}`; its bytes are in a file of tensors. The key is the path in the
tree, for example `model/first.weight`. A value that JSON does not have keeps its type: `$tuple`,
`$dict` (a dict whose keys are not texts), `$ordered` (an OrderedDict), or `$torch`, the bytes of
`torch.save` for what `leaves.read` can read.
"""

from __future__ import annotations

import base64
import io
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from dtrain.train.checkpoint import leaves
from dtrain.train.digest import local

Tensors = dict[str, torch.Tensor]

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Split:
    """A tree that is split into JSON and tensors."""

    described: Any
    tensors: Tensors
    """The tensors by key. Two names of one tensor, for example of tied weights, have one key."""
    structure: int
    """A hash of the names, types and shapes of all tensors, of 62 bits."""


def split(value: Any) -> Split:
    """Split a tree that `leaves.refuse_unreadable` accepts."""
    splitter = _Splitter()
    described = splitter.described(value, "")
    structure = xxhash.xxh3_64_intdigest(repr(splitter.facts).encode()) >> 2
    return Split(described, splitter.tensors, structure)


def join(described: Any, tensor: Callable[[str], Any]) -> Any:
    """Return the tree that `split` described.

    Args:
        described: the JSON.
        tensor: returns what stands for the tensor of a key.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is not such JSON.
    """
    if isinstance(described, list):
        return [join(each, tensor) for each in described]
    if not isinstance(described, dict):
        return described
    kind = next(iter(described), "")
    if not kind.startswith("$"):
        return {key: join(each, tensor) for key, each in described.items()}
    content = described[kind]
    if kind == "$tensor":
        return tensor(content)
    if kind == "$tuple":
        return tuple(join(each, tensor) for each in content)
    if kind in ("$dict", "$ordered"):
        make = dict if kind == "$dict" else OrderedDict
        return make((join(key, tensor), join(each, tensor)) for key, each in content)
    if kind == "$float":
        return float(content)
    if kind == "$torch":
        return leaves.read(io.BytesIO(base64.b64decode(content)))
    raise ValueError(f"it has a value of unknown kind {kind[:40]!r}")


class _Splitter:
    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self.facts: list[tuple[str, str, tuple[int, ...]]] = []
        self._keys: dict[tuple[Any, ...], str] = {}
        """The keys by the memory of their tensors."""

    def described(self, value: Any, name: str) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value if kind is not float or math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, torch.Tensor) and _is_dense(value):
            return {"$tensor": self._key(value, name)}
        if kind is list:
            return self._each(value, name)
        if kind is tuple:
            return {"$tuple": self._each(value, name)}
        if kind is dict and all(type(k) is str and not k.startswith("$") for k in value):
            return {key: self.described(each, _below(name, key)) for key, each in value.items()}
        if kind in (dict, OrderedDict):
            pairs = [
                [self.described(key, name), self.described(each, _below(name, key))]
                for key, each in value.items()
            ]
            return {"$dict" if kind is dict else "$ordered": pairs}
        file = io.BytesIO()
        torch.save(value, file)
        return {"$torch": base64.b64encode(file.getvalue()).decode()}

    def _each(self, values: Any, name: str) -> list[Any]:
        return [self.described(each, _below(name, index)) for index, each in enumerate(values)]

    def _key(self, tensor: torch.Tensor, name: str) -> str:
        self.facts.append((name, str(tensor.dtype), tuple(tensor.shape)))
        if tensor.is_conj() or tensor.is_neg():  # a view whose bytes are those of another tensor
            tensor = tensor.resolve_conj().resolve_neg()
        here = local(tensor)
        memory = (here.untyped_storage().data_ptr(), here.storage_offset(), here.stride())
        same = (*memory, here.dtype, tensor.shape) if here.numel() else (name,)
        key = self._keys.setdefault(same, name)
        if key == name:
            while key in self.tensors:  # for example {"a/b": …, "a": {"b": …}}
                key += "'"
            self._keys[same] = key
            self.tensors[key] = tensor
        return key


def _below(name: str, key: Any) -> str:
    return f"{name}/{key}" if name else str(key)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized
