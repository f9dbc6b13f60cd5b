"""Exchanges of small Python values between ranks. With one process they cost nothing.

Use them only where they are rare (start, evaluation, checkpoint): each takes a millisecond or more.
"""

from __future__ import annotations

from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dtrain.train.packed import pack, unpack

Value = TypeVar("Value")


def in_group() -> bool:
    """Return whether there is a process group with more than this process."""
    return bool(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def gather_to_all(value: Value) -> list[Value]:
    """Return every rank's value, in rank order, on every rank."""
    if not in_group():
        return [value]
    mine, sizes = _padded(pack(value))
    everyone = mine.new_empty(len(sizes) * len(mine))
    dist.all_gather(list(everyone.chunk(len(sizes))), mine)
    return [unpack(data) for data in _cut(everyone, sizes)]


def gather_to_zero(value: Value) -> list[Value]:
    """Return every rank's value, in rank order, on rank 0, and an empty list on other ranks."""
    if not in_group():
        return [value]
    mine, sizes = _padded(pack(value))
    is_zero = dist.get_rank() == 0
    everyone = mine.new_empty(len(sizes) * len(mine) if is_zero else 0)
    # one line for all ranks: collectives are compared together with the line that calls them
    dist.gather(mine, list(everyone.chunk(len(sizes))) if is_zero else None)
    return [unpack(data) for data in _cut(everyone, sizes)] if is_zero else []


def from_zero(value: Value) -> Value:
    if not in_group():
        return value
    is_zero = dist.get_rank() == 0
    data = bytes_from_rank(0, pack(value) if is_zero else b"")
    return value if is_zero else cast(Value, unpack(data))


def bytes_from_rank(rank: int, data: bytes) -> bytes:
    """Return the bytes of one rank on every rank of a group; other ranks' `data` is not used."""
    size = torch.tensor([len(data)], device=_device())
    dist.broadcast(size, src=rank)
    tensor = _tensor(data) if dist.get_rank() == rank else _tensor(bytes(int(size)))
    dist.broadcast(tensor, src=rank)
    return bytes(tensor.cpu().numpy())


def _padded(data: bytes) -> tuple[torch.Tensor, list[int]]:
    """Return this rank's bytes, padded to the longest of all ranks, and the size of each rank."""
    size = torch.tensor([len(data)], device=_device())
    sizes = size.new_empty(dist.get_world_size())
    dist.all_gather(list(sizes.chunk(len(sizes))), size)
    return _tensor(data.ljust(int(sizes.max()))), sizes.tolist()


def _cut(everyone: torch.Tensor, sizes: list[int]) -> list[bytes]:
    rows = everyone.view(len(sizes), -1).cpu().numpy()
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device())


def _device() -> torch.device:
    """Return the device that the group sends from: a script may make a group for GPUs only."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def gather_numbers(*mine: int) -> list[tuple[int, ...]]:
    """Return every rank's integers, in rank order, on every rank. It takes 0.3 ms.

    All ranks give the same number of integers.
    """
    if not in_group():
        return [mine]
    everyone = torch.empty(dist.get_world_size() * len(mine), dtype=torch.int64)
    dist.all_gather(list(everyone.chunk(dist.get_world_size())), torch.tensor(mine))
    rows = everyone.view(-1, len(mine)).tolist()
    return [tuple(row) for row in rows]


def sum_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the sums over all ranks, elementwise and modulo 2**64, on every rank."""
    if not in_group():
        return words
    low, high = words & np.uint64(2**32 - 1), words >> np.uint64(32)
    halves = torch.from_numpy(np.stack([low, high]).astype(np.int64))
    dist.all_reduce(halves)  # no overflow below 2**31 ranks
    low, high = halves.numpy().astype(np.uint64)
    summed: NDArray[np.uint64] = low + (high << np.uint64(32))
    return summed
