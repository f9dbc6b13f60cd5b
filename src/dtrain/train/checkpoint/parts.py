"""The part of a checkpoint that a rank writes: a safetensors file with its share of the tensors.

A sharded tensor is written by the ranks that hold its shards. Replicas are shared evenly, by bytes.
Every rank computes the same plan, so that no rank waits for another. (The planner of
torch.distributed.checkpoint exchanges plans between ranks as pickles.)
"""

from __future__ import annotations

import functools
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.errors import CheckpointError
from dtrain.train import digest
from dtrain.train.checkpoint.blocks import BlockFile
from dtrain.train.checkpoint.proof import require_same

Shape = tuple[int, ...]

_SPLIT_FROM = 1 << 20
"""Replicas with fewer bytes are written by one rank, because each chunk costs 0.1 ms."""
_OWN = "dtrain"
"""The entry of a file's metadata with what safetensors has no field for."""
_MOST_HEADER = 100_000_000  # safetensors' own limit
_SAFETENSORS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.uint16: "U16", torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64",
    torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The names of types in safetensors. Any other type is stored as bytes."""
_TYPES = {name: dtype for dtype, name in _SAFETENSORS.items()}


def dtype_of(name: str) -> torch.dtype | None:
    """Return the type that has a name in safetensors. None if torch has none."""
    return _TYPES.get(name)


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
            pieces += [Piece(key, shape, (0,) * tensor.ndim, tensor)] if rank == 0 else []
        else:
            first, last = _rows_before(low, tensor), _rows_before(high, tensor)
            if last > first:
                data = tensor[first:last] if tensor.ndim else tensor
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
    here: torch.Tensor = tensor.to_local()
    return here, _offsets(tensor.shape, tensor.device_mesh, tensor.placements)


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
        self.header_bytes = len(self.header([_NO_DIGEST] * len(self.pieces)))
        self.bytes = self.header_bytes + sum(each.bytes for each in self.pieces)
        """The size of the file."""

    def header(self, digests: Sequence[str]) -> bytes:
        """Return the header, with the digest of each piece. All digests have the same length."""
        entries: dict[str, Any] = {}
        own: dict[str, Any] = {}
        start = 0
        for piece, live in zip(self.pieces, digests, strict=True):
            name = _name(piece)
            while name in entries:
                name += "'"
            kind, sizes = _SAFETENSORS.get(piece.data.dtype), list(piece.data.shape)
            end = start + piece.bytes
            entries[name] = {
                "dtype": kind or "U8",
                "shape": sizes if kind else [piece.bytes],
                "data_offsets": [start, end],
            }
            dtype = str(piece.data.dtype).removeprefix("torch.")
            own[name] = [piece.key, dtype, piece.shape, piece.offsets, sizes, live]
            start = end
        metadata = {"format": "pt", _OWN: json.dumps(own)}
        text = json.dumps({"__metadata__": metadata, **entries}).encode()
        text += b" " * ((56 - len(text)) % 64)  # with the 8 bytes of its length, a multiple of 64
        return len(text).to_bytes(8, "little") + text

    def buffers(self) -> Iterator[Any]:
        """Yield the bytes of the file, from the live tensors.

        Raises:
            CheckpointError: the copy of a tensor of a GPU differs from it.
        """
        digests = digest.texts_of_each(piece.data for piece in self.pieces)
        yield self.header(digests)
        for piece, live in zip(self.pieces, digests, strict=True):
            data = as_bytes(piece.data)
            if piece.data.device.type != "cpu":
                require_same(data, itemsize(piece.data), live, piece.key)
            yield data


_NO_DIGEST = f"xxh3:{0:016x}"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    view: memoryview = flat.numpy().data
    return view


def itemsize(tensor: torch.Tensor) -> int:
    """Return the size of a number in bytes: half that of an element if it is complex."""
    return int(tensor.element_size()) // (2 if tensor.is_complex() else 1)


def _name(piece: Piece) -> str:
    sizes = piece.data.shape
    if tuple(sizes) == piece.shape:
        return piece.key
    pairs = zip(piece.offsets, sizes, strict=True)
    return f"{piece.key}[{','.join(f'{low}:{low + size}' for low, size in pairs)}]"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor in a file."""

    file: BlockFile
    start: int
    """The position of its first byte in the file."""
    offsets: Shape
    sizes: Shape


class StoredTensor:
    """A tensor in the files of a checkpoint. It is read in parts, and every byte is verified."""

    def __init__(self, key: str, dtype: torch.dtype, shape: Shape) -> None:
        self.key = key
        self.dtype = dtype
        self.shape = torch.Size(shape)
        self.chunks: list[Chunk] = []

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
            raise CheckpointError(
                f"{missing} elements of {self.key} are in no file", code="checkpoint.damaged-file"
            )
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
        at_once = max(1, _AT_ONCE // row)
        (first, last), rest = overlap[0], overlap[1:]
        for dim, (low, high) in enumerate(rest, start=1):
            target = target.narrow(dim, low - origins[dim], high - low)
        for low in range(first, last, at_once):
            count = min(at_once, last - low)
            begin = chunk.start + (low - starts[0]) * row
            data = torch.frombuffer(chunk.file.read(begin, begin + count * row), dtype=torch.uint8)
            rows = data.view(read_as).view(count, *sizes[1:])
            for dim, (start, end) in enumerate(rest, start=1):
                rows = rows.narrow(dim, start - starts[dim], end - start)
            target.narrow(0, low - origins[0], count).copy_(rows)
        return math.prod(high - low for low, high in overlap)


_AT_ONCE = 4 << 20
"""The number of bytes that are copied at a time; more if a row is larger."""


def whole(value: Any) -> Any:
    """Return a tree with every stored tensor read, on the CPU."""
    if isinstance(value, StoredTensor):
        return value.read()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, whole(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(whole(each) for each in value)
    return value


def read_header(file: BlockFile, found: dict[str, StoredTensor]) -> None:
    """Add the chunks in a part's file to the tensors of a checkpoint.

    Raises:
        CheckpointError: it is not such a file.
    """
    try:
        length = int.from_bytes(file.read(0, 8), "little")
        if length > _MOST_HEADER:
            raise ValueError(f"its header has {length} bytes")
        entries = json.loads(bytes(file.read(8, 8 + length)))
        own = json.loads(entries.pop("__metadata__")[_OWN])
        for name, entry in entries.items():
            key, kind, shape, offsets, sizes, _ = own[name]
            dtype: torch.dtype = getattr(torch, kind)
            start, end = entry["data_offsets"]
            tensor = found.setdefault(key, StoredTensor(key, dtype, tuple(shape)))
            chunk = Chunk(file, 8 + length + start, tuple(offsets), tuple(sizes))
            _check(chunk, tensor, dtype, tuple(shape), end - start)
            tensor.chunks.append(chunk)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name} is damaged: {error!r:.200}", code="checkpoint.damaged-file"
        ) from error


def _check(chunk: Chunk, tensor: StoredTensor, dtype: torch.dtype, shape: Shape, size: int) -> None:
    boxes = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    if (
        (dtype, shape) != (tensor.dtype, tuple(tensor.shape))
        or not all(low >= 0 and n >= 0 and low + n <= most for low, n, most in boxes)
        or math.prod(chunk.sizes) * dtype.itemsize != size
        or chunk.start < 0
        or chunk.start % dtype.itemsize  # processors crash on some unaligned numbers
    ):
        raise ValueError(f"the entry of {tensor.key} is impossible")
