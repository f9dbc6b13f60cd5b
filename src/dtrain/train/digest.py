"""Digests of the bits of tensors: 64 bits that change with any element, its position or its sign.

On the CPU the digest is xxh3, which runs at memory speed (27 ms for 1e8 fp32 elements). On a GPU
it is a weighted sum of all elements in integers modulo 2**64; the position of an element decides
its factor. Both change with swapped elements and rows, flipped signs and NaN payloads. Sums, norms
and `torch.hash_tensor` do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

_CHUNK = 1 << 24
"""The number of elements that a GPU processes at a time: each factor takes 8 bytes."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = 0xBF58476D1CE4E5B9 - (1 << 64)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, detached; all of it if it is not sharded."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach()
    with torch.no_grad():  # or a sharded tensor is dispatched, which takes 0.1 ms
        return tensor.to_local()


def of_each(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return the digest of the bits of each tensor, without its shape and type."""
    parts = [local(tensor) for tensor in tensors]
    if all(part.device.type == "cpu" for part in parts):
        return [xxhash.xxh3_64_intdigest(_bytes(part)) for part in parts]
    sums = [weighted_sum(part).cpu() for part in parts]
    return [xxhash.xxh3_64_intdigest(each.numpy().tobytes()) for each in sums]


def texts_of_each(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Return the digest of each tensor as a text, with the method: xxh3, or wsum on a GPU."""
    parts = [local(tensor) for tensor in tensors]
    method = "xxh3" if all(part.device.type == "cpu" for part in parts) else "wsum"
    return [f"{method}:{each:016x}" for each in of_each(parts)]


def of_all(tensors: Sequence[torch.Tensor]) -> int:
    """Return one digest of all tensors, in the given order."""
    parts = [local(tensor) for tensor in tensors]
    digest = xxhash.xxh3_64()
    if all(part.device.type == "cpu" for part in parts):
        for part in parts:
            digest.update(_bytes(part))
        return digest.intdigest()
    for each in torch.stack([weighted_sum(part).cpu() for part in parts]):
        digest.update(each.numpy().tobytes())
    return digest.intdigest()


def of_leaves(leaves: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return two texts for each leaf.

    For a tensor or an array they are the type with the shape, and the digest. For any other
    leaf they are the type and the value.
    """
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    digests = dict(zip(tensors, of_each(tensors.values()), strict=True))
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray):
            digests[name] = xxhash.xxh3_64_intdigest(leaf.tobytes())
    return {
        name: (f"{leaf.dtype} {tuple(leaf.shape)}", str(digests[name]))
        if name in digests
        else (type(leaf).__name__, repr(leaf))
        for name, leaf in leaves.items()
    }


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as a flat tensor with one integer per element."""
    flat = tensor.contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def weighted_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return two sums over the elements' bits, weighted by a hash of the position; int64, (2,).

    A factor is odd, so any change of one element changes the first sum. Two swapped elements
    change it too, unless the difference of their factors, a random number, cancels their own
    difference. The second sum has other factors.
    """
    bits = as_integers(tensor)
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        position = torch.arange(start + 1, start + 1 + len(part), device=bits.device)
        factor = position * _GOLDEN
        factor = (factor ^ (factor >> 30)) * _MIX
        factor = factor ^ (factor >> 27)
        total[0] += (part * (factor | 1)).sum()
        total[1] += (part * ((factor >> 32) | 1)).sum()
    return total


def _bytes(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    view: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view
