"""Packs small values into bytes for exchanges between ranks, without pickle.

A pickle can run any code of its sender. `unpack` makes only numbers, strings, containers, arrays,
tensors, and the few classes that are marked with `exchanged`.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

Class = TypeVar("Class", bound=type[Any])

_CLASSES: dict[str, type[Any]] = {}
_PLAIN = (int, str, float, bool, type(None))
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


def exchanged(cls: Class) -> Class:
    """Mark a dataclass or NamedTuple of dtrain whose values ranks exchange."""
    _CLASSES[cls.__name__] = cls
    return cls


def pack(value: Any) -> bytes:
    """Return a value as bytes.

    Raises:
        TypeError: it holds an object that cannot be exchanged.
    """
    return json.dumps(_described(value)).encode()


def unpack(data: bytes) -> Any:
    """Return the value that `pack` packed.

    Raises:
        ValueError: the bytes are not a packed value.
    """
    try:
        return _made(json.loads(data))
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"another rank sent bytes that are not a value: {error!r}") from error


def _described(value: Any) -> Any:
    """Return the JSON form of a value.

    A value that JSON has is unchanged. Any other is an object with one key, its kind.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_described(each) for each in value]
    if kind is dict:
        return {"dict": [[_described(k), _described(v)] for k, v in value.items()]}
    if _CLASSES.get(kind.__name__) is kind:
        return {kind.__name__: [_described(each) for each in _fields(value)]}
    if kind in (tuple, set, frozenset, torch.Size):
        return {"tuple" if kind is torch.Size else kind.__name__: [_described(e) for e in value]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return {"tensor": [str(value.dtype), list(value.shape), _text(flat.numpy())]}
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        name = "array" if isinstance(value, np.ndarray) else "number"
        return {name: [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": _text(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for base in _PLAIN[:3]:  # an instance of a subclass
        if isinstance(value, base):
            return base(value)
    raise TypeError(f"ranks cannot exchange a {kind.__module__}.{kind.__qualname__}")


def _fields(value: Any) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        return value
    return tuple(getattr(value, field.name) for field in dataclasses.fields(value))


def _text(data: Any) -> str:
    return base64.b64encode(data).decode()


def _made(described: Any) -> Any:
    if isinstance(described, list):
        return [_made(each) for each in described]
    if not isinstance(described, dict):
        return described
    ((kind, content),) = described.items()
    if kind in _MAKERS:
        return _MAKERS[kind](content)
    return _CLASSES[kind](*map(_made, content))


def _array(content: Any) -> Any:
    dtype, shape, text = content
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape).copy()


def _tensor(content: Any) -> torch.Tensor:
    name, shape, text = content
    data = bytearray(base64.b64decode(text))
    dtype = _DTYPES[name]
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda pairs: {_made(key): _made(value) for key, value in pairs},
    "tuple": lambda content: tuple(map(_made, content)),
    "set": lambda content: set(map(_made, content)),
    "frozenset": lambda content: frozenset(map(_made, content)),
    "range": lambda content: range(*content),
    "array": _array,
    "number": lambda content: _array(content)[()],
    "tensor": _tensor,
    "bytes": base64.b64decode,
    "complex": lambda content: complex(*content),
}
