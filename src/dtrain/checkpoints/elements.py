"""The elements of torch's types, from their bytes: numpy has no bfloat16 and no 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.train.checkpoint.headers import Bytes

Array = np.ndarray[Any, np.dtype[Any]]

_NUMPY = {
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
"""The types that have the same name and the same bits in numpy."""
_SMALL = {
    "float8_e4m3fn": (3, 7, (0x7F, 0xFF)),
    "float8_e4m3fnuz": (3, 8, (0x80,)),
    "float8_e5m2fnuz": (2, 16, (0x80,)),
    "float8_e8m0fnu": (0, 127, (0xFF,)),
}
"""The bits of the mantissa, the bias of the exponent, and the bytes that are NaN."""


@dataclass(frozen=True)
class Distance:
    """How pairs of elements differ."""

    largest: float
    relative: float
    nan: tuple[int, int]


def different(itemsize: int, one: Bytes, other: Bytes) -> Array:
    """Return for each element whether its bits differ."""
    words = f"u{min(itemsize, 8)}"
    unequal: Any = one.view(words) != other.view(words)
    mask: Array = unequal.reshape(-1, itemsize // min(itemsize, 8)).any(axis=1)
    return mask


def distance(dtype: str, one: Bytes, other: Bytes) -> Distance:
    """Return how far elements are apart. Infinitely, if only one of a pair is finite."""
    a, b = numbers(dtype, one), numbers(dtype, other)
    nan = (int(np.isnan(a).sum()), int(np.isnan(b).sum()))
    with np.errstate(all="ignore"):
        apart = _integers_apart(a, b) if a.dtype.kind in "iu" else np.abs(a - b)
        apart = np.where(np.isnan(apart) | ~np.isfinite(apart), np.inf, apart)
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, apart)
        size = np.maximum(np.abs(a.astype(_wide(a))), np.abs(b.astype(_wide(b))))
        relative = np.where(np.isinf(apart) | (apart == 0), apart, apart / size)
    return Distance(float(apart.max(initial=0.0)), float(relative.max(initial=0.0)), nan)


def _integers_apart(a: Array, b: Array) -> Array:
    """Return exact differences as floats: those of large integers are lost between floats."""
    bits = (each.astype(np.int64 if each.dtype.kind == "i" else np.uint64) for each in (a, b))
    x, y = (each.view(np.uint64) for each in bits)
    return np.where(a > b, x - y, y - x).astype(np.float64)


def _wide(array: Array) -> type[Any]:
    return np.complex128 if array.dtype.kind == "c" else np.float64


@np.errstate(all="ignore")  # for signalling NaNs
def numbers(dtype: str, data: Bytes) -> Array:
    """Return elements as numbers. Those of a type without values are taken as integers."""
    if dtype == "bool":
        return data.view(np.uint8)
    if dtype in _NUMPY:
        found = data.view(dtype)
        return found if found.dtype.kind in "iu" else found.astype(_wide(found))
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "complex32":
        pairs = data.view(np.float16).astype(np.float64)
        return pairs.view(np.complex128)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (data.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    return _values(*_SMALL[dtype])[data] if dtype in _SMALL else data


def _values(mantissa_bits: int, bias: int, nan: tuple[int, ...]) -> Array:
    """Return the value of each byte as an 8-bit float."""
    byte = np.arange(256)
    magnitude = byte & 0x7F if mantissa_bits else byte  # the other kind has no sign
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
    subnormal = (exponent == 0) & (mantissa_bits > 0)
    fraction = mantissa / (1 << mantissa_bits) + np.where(subnormal, 0.0, 1.0)
    values = fraction * 2.0 ** (np.where(subnormal, 1, exponent) - bias)
    values = np.where(magnitude != byte, -values, values)
    values[list(nan)] = np.nan
    return values
