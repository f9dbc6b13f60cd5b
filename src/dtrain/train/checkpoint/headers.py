"""The tensors of a checkpoint as bytes: what its files say about them. Nothing here needs torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint.blocks import BlockFile

Shape = tuple[int, ...]
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

SAFETENSORS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""The names of torch's types in safetensors."""
DTYPES = {name: dtype for dtype, name in SAFETENSORS.items()}
"""The names in torch of the types of safetensors."""
OWN = "dtrain"
"""The entry of a file's metadata with what safetensors has no field for."""
_MOST_HEADER = 100_000_000  # safetensors' own limit
_AT_ONCE = 1 << 20


class Described(NamedTuple):
    """A box of a tensor that is written into a file, without its bytes."""

    key: str
    dtype: str
    """The name of its type in torch."""
    shape: Shape
    """The shape of the whole tensor."""
    offsets: Shape
    sizes: Shape
    bytes: int
    itemsize: int
    """The size of a number in bytes: half that of an element if it is complex."""
    digest: str
    """The digest of the live tensor."""


def header(pieces: Sequence[Described]) -> bytes:
    """Return the header of a safetensors file in which the bytes of these pieces follow."""
    entries: dict[str, Any] = {}
    own: dict[str, Any] = {}
    start = 0
    for piece in pieces:
        name = _name(piece)
        while name in entries:
            name += "'"
        kind = SAFETENSORS.get(piece.dtype)
        end = start + piece.bytes
        entries[name] = {
            "dtype": kind or "U8",
            "shape": piece.sizes if kind else [piece.bytes],
            "data_offsets": [start, end],
        }
        own[name] = [
            piece.key, piece.dtype, piece.shape, piece.offsets, piece.sizes, piece.digest
        ]  # fmt: skip
        start = end
    metadata = {"format": "pt", OWN: json.dumps(own)}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * ((56 - len(text)) % 64)  # with the 8 bytes of its length, a multiple of 64
    return len(text).to_bytes(8, "little") + text


def _name(piece: Described) -> str:
    if tuple(piece.sizes) == tuple(piece.shape):
        return piece.key
    pairs = zip(piece.offsets, piece.sizes, strict=True)
    return f"{piece.key}[{','.join(f'{low}:{low + size}' for low, size in pairs)}]"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor in a file."""

    file: BlockFile
    start: int
    """The position of its first byte in the file."""
    offsets: Shape
    sizes: Shape
    digest: str
    """The digest of the live tensor when it was saved."""


@dataclass
class StoredBytes:
    """A tensor in the files of a checkpoint. Its bytes are verified when they are read."""

    key: str
    dtype: str
    """The name of its type in torch."""
    shape: Shape
    itemsize: int
    """The size of an element in bytes. 0 if there are no elements."""
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def layout(self) -> set[tuple[Shape, Shape, str]]:
        """The boxes that it is cut into, with the digest of each."""
        return {(each.offsets, each.sizes, each.digest) for each in self.chunks}

    def pieces(self) -> Iterator[Bytes]:
        """Yield its bytes from first to last, at most 1 MiB at a time.

        Raises:
            CheckpointError: a byte is damaged, or a part is missing.
        """
        for offsets, sizes in _boxes(self.shape, self.itemsize):
            yield self._read(offsets, sizes)

    def _read(self, offsets: Shape, sizes: Shape) -> Bytes:
        """Return the bytes of one of the `_boxes`: what a chunk has of it is one range of bytes."""
        box = np.empty((*sizes, self.itemsize), dtype=np.uint8)
        missing = math.prod(sizes)
        for chunk in self.chunks:
            pairs = zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
            overlap = [(max(a, b), min(a + m, b + n)) for a, m, b, n in pairs]
            if any(low >= high for low, high in overlap):
                continue
            here = tuple(high - low for low, high in overlap)
            first = 0
            for (low, _), offset, size in zip(overlap, chunk.offsets, chunk.sizes, strict=True):
                first = first * size + low - offset
            start = chunk.start + first * self.itemsize
            data = chunk.file.read(start, start + math.prod(here) * self.itemsize)
            found = np.frombuffer(data, dtype=np.uint8).reshape(*here, self.itemsize)
            if here == sizes:
                box = found
            else:
                pairs_here = zip(overlap, offsets, strict=True)
                box[tuple(slice(low - o, high - o) for (low, high), o in pairs_here)] = found
            missing -= math.prod(here)
        if missing:
            raise elements_missing(self.key, missing)
        return box.reshape(-1)


def _boxes(shape: Shape, itemsize: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield the offsets and sizes of boxes whose bytes follow one another in a tensor."""
    if 0 in shape:
        return
    dim, row = 0, math.prod(shape[1:]) * itemsize
    while row > _AT_ONCE:
        dim += 1
        row //= shape[dim]
    if not shape:
        yield (), ()
        return
    count, rest = _AT_ONCE // row, shape[dim + 1 :]
    for leading in product(*(range(size) for size in shape[:dim])):
        for low in range(0, shape[dim], count):
            sizes = (*(1 for _ in leading), min(count, shape[dim] - low), *rest)
            yield (*leading, low, *(0 for _ in rest)), sizes


def elements_missing(key: str, number: int) -> CheckpointError:
    return CheckpointError(
        f"{number} elements of {key} are in no file", code="checkpoint.damaged-file"
    )


def read_headers(files: Iterable[BlockFile]) -> dict[str, StoredBytes]:
    """Return the tensors in parts' files, by key.

    Raises:
        CheckpointError: one is not such a file.
    """
    found: dict[str, StoredBytes] = {}
    for file in files:
        try:
            _read_header(file, found)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{file.name} is damaged: {error!r:.200}", code="checkpoint.damaged-file"
            ) from error
    return found


def _read_header(file: BlockFile, found: dict[str, StoredBytes]) -> None:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > _MOST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    entries = json.loads(bytes(file.read(8, 8 + length)))
    own = json.loads(entries.pop("__metadata__")[OWN])
    for name, entry in entries.items():
        key, dtype, shape, offsets, sizes, digest = own[name]
        start, end = entry["data_offsets"]
        chunk = Chunk(file, 8 + length + start, tuple(offsets), tuple(sizes), digest)
        tensor = _described(key, dtype, tuple(shape), chunk, end - start)
        known = found.setdefault(key, tensor)
        known.itemsize = known.itemsize or tensor.itemsize
        same = (known.dtype, known.shape) == (tensor.dtype, tensor.shape)
        if not same or tensor.itemsize not in (0, known.itemsize):
            raise ValueError(f"the entries of {key} differ")
        known.chunks.append(chunk)


def _described(key: Any, dtype: Any, shape: Shape, chunk: Chunk, size: int) -> StoredBytes:
    boxes = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    number = math.prod(chunk.sizes)
    if (
        not (isinstance(key, str) and isinstance(dtype, str))
        or not all(low >= 0 and n >= 0 and low + n <= most for low, n, most in boxes)
        or chunk.start < 0
        or size % (number or 1)
        or (size == 0) != (number == 0)
        or chunk.start % (size // number if number else 1)  # processors crash on unaligned numbers
    ):
        raise ValueError(f"the entry of {key} is impossible")
    return StoredBytes(key, dtype, shape, size // number if number else 0)
