"""Digests and short forms of tensors and random states, for traces."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
import xxhash

from dtrain.trace import Vector
from dtrain.train.seeding import derive_seed

NUM_BUCKETS = 4096
"""The largest number of elements of a tensor that is kept in full; a larger one becomes a sketch of
this length. The squared norm of a sketch has a standard deviation of sqrt(2 / 4096) = 2 %."""

_CHUNK = 1 << 20


def of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Return an xxh3 over types, shapes and bytes. It is equal exactly if every bit is."""
    hashed = xxhash.xxh3_128()
    for tensor in tensors:
        here = tensor.detach().cpu().contiguous()
        hashed.update(f"{here.dtype} {tuple(here.shape)}\n".encode())
        hashed.update(here.reshape(-1).view(torch.uint8).numpy())
    return str(hashed.hexdigest())


def of_random_state() -> str:
    """Return a digest of the global generators of torch, Python and NumPy; about 50 µs."""
    hashed = xxhash.xxh3_128(torch.get_rng_state().numpy())
    hashed.update(repr(random.getstate()).encode())
    hashed.update(repr(np.random.get_state(legacy=False)).encode())
    if torch.cuda.is_initialized():
        hashed.update(torch.cuda.get_rng_state().numpy())
    return str(hashed.hexdigest())


def norm_of(tensor: torch.Tensor) -> float:
    here = tensor.detach()
    return float(torch.linalg.vector_norm((here.abs() if here.is_complex() else here).double()))


def as_vector(name: str, tensor: torch.Tensor) -> Vector:
    """Return a tensor as a vector of fp64 with at most `NUM_BUCKETS` elements.

    Args:
        name: decides the random signs and buckets, which are the same in every process.
        tensor: a tensor of any shape and type; complex numbers become pairs.
    """
    here = tensor.detach().cpu()
    if here.is_complex():
        here = torch.view_as_real(here)
    flat = here.reshape(-1).double()
    if flat.numel() > NUM_BUCKETS:
        flat = _sketch(name, flat)
    vector: Vector = flat.numpy().copy()
    return vector


def _sketch(name: str, flat: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(derive_seed("sketch", name, flat.numel()))
    buckets = torch.zeros(NUM_BUCKETS, dtype=torch.float64)
    for part in flat.split(_CHUNK):
        drawn = torch.randint(2 * NUM_BUCKETS, part.shape, generator=draw)
        sign = (drawn & 1).double() * 2 - 1
        buckets.index_add_(0, drawn >> 1, part * sign)
    return buckets
