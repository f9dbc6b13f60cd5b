"""The part of a checkpoint that a rank writes: a safetensors file with its share of the tensors.

A sharded tensor is written by the ranks that hold its shards. Replicas are shared evenly, by bytes.
Every rank computes the same plan, so that no rank waits for another. (The planner of
torch.distributed.checkpoint exchanges plans between ranks as pickles.)
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.errors import CheckpointError
from dtrain.train import digest
from dtrain.train.checkpoint.blocks import BLOCK
from dtrain.train.checkpoint.headers import (
    Chunk,
    Described,
    Shape,
    StoredBytes,
    elements_missing,
    header,
)
from dtrain.train.checkpoint.proof import require_same

_SPLIT_FROM = 1 << 20
"""Replicas with fewer bytes are written by one rank, because each chunk costs 0.1 ms."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this rank writes."""

    key: str
    shape: Shape
    """The shape of the whole tensor."""
    offsets: Shape
    data: torch.Tensor
    """The live tensor, or a view of it; on its device."""

    @property
    def bytes(self) -> int:
        return int(self.data.nbytes)

    def described(self, live: str) -> Described:
        """Return what the header of a file says about it, with the digest of its live tensor."""
        dtype = str(self.data.dtype).removeprefix("torch.")
        sizes, itemsize = tuple(self.data.shape), _itemsize(self.data)
        return Described(
            self.key, dtype, self.shape, self.offsets, sizes, self.bytes, itemsize, live
        )


def _itemsize(tensor: torch.Tensor) -> int:
    return int(tensor.element_size()) // (2 if tensor.is_complex() else 1)


def share(tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> list[Piece]:
    """Return the pieces that a rank writes.

    Args:
        tensors: the tensors by key, with the same keys and shapes on all ranks. Tensors that are
            not sharded are the same on all ranks.
        rank: this rank.
        world_size: the number of ranks.

    Returns:
        Replicas first: every rank reads those of all files, and only its shards of the others.
    """
    pieces: list[Piece] = []
    shards: list[Piece] = []
    whole = [each for each in tensors.values() if not is_part(each)]
    total = sum(each.nbytes for each in whole)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if is_part(tensor):
            here, offsets = local_box(tensor)
            if here.numel() and _is_first_copy(tensor):
                shards.append(Piece(key, shape, offsets, here))
        elif tensor.numel() == 0:
            data = tensor.detach()
            pieces += [Piece(key, shape, (0,) * tensor.ndim, data)] if rank == 0 else []
        else:
            first, last = _rows_before(low, tensor), _rows_before(high, tensor)
            if last > first:
                data = tensor.detach()
                if last - first < (data.shape[0] if data.ndim else 1):
                    data = data[first:last]
                pieces.append(Piece(key, shape, (first, *(0,) * tensor.ndim)[: tensor.ndim], data))
            size = tensor.nbytes
            low, high = low - size, high - size
    return pieces + shards


def _rows_before(position: int, tensor: torch.Tensor) -> int:
    """Return the number of rows that start before a position, in bytes; a small one has one row."""
    rows = tensor.shape[0] if tensor.ndim else 1
    size = tensor.nbytes
    if position <= 0:
        return 0
    return rows if size < _SPLIT_FROM else min(rows, math.ceil(position / (size // rows)))


def is_part(tensor: Any) -> bool:
    """Return whether a tensor is sharded, so that this rank holds only a part of it."""
    return hasattr(tensor, "full_tensor")


def local_box(tensor: torch.Tensor) -> tuple[torch.Tensor, Shape]:
    """Return what this rank holds of a tensor, and its offsets in the whole tensor."""
    if not is_part(tensor):
        return tensor, (0,) * tensor.ndim
    return digest.local(tensor), _offsets(tensor.shape, tensor.device_mesh, tensor.placements)


@functools.lru_cache(maxsize=1024)
def _offsets(shape: torch.Size, mesh: Any, placements: Any) -> Shape:
    """Return the offsets of this rank's shard. A parameter and its moments have the same."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(shape, mesh, placements)[1])


def _is_first_copy(tensor: Any) -> bool:
    """Return whether no rank before this one holds the same shard."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    placed = zip(coordinate, tensor.placements, strict=True)
    return all(where == 0 for where, placement in placed if placement.is_replicate())


# -- files -----------------------------------------------------------------------------------


class Image:
    """The content of a part's file: a header, then the bytes of each piece."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        # the largest elements first: then each piece is aligned, without gaps
        self.pieces = sorted(pieces, key=lambda each: -each.data.element_size())
        self.bytes = sum(each.bytes for each in self.pieces)
        """The size of the file without its header."""

    def described(self, digests: Sequence[str]) -> list[Described]:
        """Return what the header says about each piece, with the digest of its live tensor."""
        pairs = zip(self.pieces, digests, strict=True)
        return [piece.described(live) for piece, live in pairs]

    def buffers(self) -> Iterator[Any]:
        """Yield the bytes of the file, from the live tensors.

        Raises:
            CheckpointError: the copy of a tensor of a GPU differs from it.
        """
        described = self.described(digest.texts_of_each(piece.data for piece in self.pieces))
        yield header(described)
        for piece, about in zip(self.pieces, described, strict=True):
            data = as_bytes(piece.data)
            if piece.data.device.type != "cpu":
                require_same(data, about)
            yield data


def as_bytes(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    view: memoryview = flat.numpy().data
    return view


class StoredTensor:
    """A tensor in the files of a checkpoint. It is read in parts, and every byte is verified."""

    def __init__(self, stored: StoredBytes) -> None:
        dtype = getattr(torch, stored.dtype, None)
        if not isinstance(dtype, torch.dtype) or stored.itemsize not in (0, dtype.itemsize):
            raise CheckpointError(
                f"the type of {stored.key} is damaged: {stored.dtype!r:.40}",
                code="checkpoint.damaged-file",
            )
        self.key = stored.key
        self.dtype = dtype
        self.shape = torch.Size(stored.shape)
        self.chunks = stored.chunks

    def read(self) -> torch.Tensor:
        """Return the whole tensor, on the CPU."""
        return self.read_into(torch.empty(self.shape, dtype=self.dtype))

    def read_like(self, like: Any) -> torch.Tensor:
        """Return it on the device of a tensor; this rank's shard if that is sharded likewise."""
        if not isinstance(like, torch.Tensor) or like.shape != self.shape:
            return self.read()
        made = torch.empty_like(like, dtype=self.dtype, requires_grad=False)
        return self.read_into(made)

    def read_into(self, target: torch.Tensor) -> torch.Tensor:
        """Copy it into a tensor of its shape; only this rank's part if that is sharded.

        Raises:
            CheckpointError: a byte is damaged, or a part is missing.
        """
        here, offsets = local_box(target.detach())
        missing = here.numel()
        for chunk in self.chunks:
            missing -= self._copy(chunk, here, offsets)
        if missing:
            raise elements_missing(self.key, missing)
        return target

    def _copy(self, chunk: Chunk, here: torch.Tensor, offsets: Shape) -> int:
        """Copy the elements that a chunk has of a part of the tensor. Return their number."""
        boxes = zip(chunk.offsets, chunk.sizes, offsets, here.shape, strict=True)
        overlap = [(max(a, b), min(a + m, b + n)) for a, m, b, n in boxes]
        if any(low >= high for low, high in overlap):
            return 0
        sizes = chunk.sizes or (1,)
        target = here if chunk.sizes else here.reshape(1)
        overlap = overlap or [(0, 1)]
        starts, origins = chunk.offsets or (0,), offsets or (0,)
        read_as = self.dtype
        if read_as == target.dtype and read_as.itemsize == 1:  # torch cannot copy int4
            read_as, target = torch.uint8, target.view(torch.uint8)
        row = math.prod(sizes[1:]) * self.dtype.itemsize
        (first, last), rest = overlap[0], overlap[1:]
        for dim, (low, high) in enumerate(rest, start=1):
            target = target.narrow(dim, low - origins[dim], high - low)
        low = first
        while low < last:
            begin = chunk.start + (low - starts[0]) * row
            # rows of one block are read without a copy; one that lies in two comes alone
            count = min(max(1, (BLOCK - begin % BLOCK) // row), last - low)
            data = torch.frombuffer(chunk.file.read(begin, begin + count * row), dtype=torch.uint8)
            rows = data.view(read_as).view(count, *sizes[1:])
            for dim, (start, end) in enumerate(rest, start=1):
                rows = rows.narrow(dim, start - starts[dim], end - start)
            target.narrow(0, low - origins[0], count).copy_(rows)
            low += count
        return math.prod(high - low for low, high in overlap)


def whole(value: Any) -> Any:
    """Return a tree with every stored tensor read, on the CPU."""
    if isinstance(value, StoredTensor):
        return value.read()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, whole(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(whole(each) for each in value)
    return value
