"""Files with a digest for each block, so that any part of them can be read and verified.

The common formats do not notice a flipped byte: torch.save files, safetensors and DCP shards load
it without an error. A digest of the whole file would make every rank read all of it. Digests are
computed from the bytes that are written, not from what the disk returns.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dtrain.errors import CheckpointError
from dtrain.run.manifest import Entry

BLOCK = 4 << 20
"""The size of a block in bytes. A manifest has 8 MB of digests for 1 TB."""
_MOST_CACHED = 8


def write_file(path: Path, pieces: Iterable[Any]) -> Entry:
    """Write a file from buffers of bytes, and fsync it.

    Returns:
        Its size and the digests of its blocks.
    """
    digests: list[str] = []
    block, size = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=1 << 16) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                part = view[: BLOCK - size % BLOCK]
                block.update(part)
                file.write(part)
                size += len(part)
                if size % BLOCK == 0:
                    digests.append(block.hexdigest())
                    block.reset()
                view = view[len(part) :]
        file.flush()
        os.fsync(file.fileno())
    if size % BLOCK:
        digests.append(block.hexdigest())
    return Entry(size, digests)


class Cache:
    """The blocks of several files that were read last: small tensors share blocks."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], memoryview] = OrderedDict()

    def get(self, key: tuple[str, int]) -> memoryview | None:
        found = self._blocks.get(key)
        if found is not None:
            self._blocks.move_to_end(key)
        return found

    def put(self, key: tuple[str, int], block: memoryview) -> None:
        self._blocks[key] = block
        if len(self._blocks) > _MOST_CACHED:
            self._blocks.popitem(last=False)


class BlockFile:
    """A file to read parts of. Every byte is verified before it is returned.

    Args:
        path: the path of the file.
        entry: its entry in the manifest.
        cache: the cache to use, which several files may share.

    Raises:
        CheckpointError: it is missing, not a regular file, or has another size. Messages contain
            its name, not its directory.
    """

    def __init__(self, path: Path, entry: Entry, cache: Cache | None = None) -> None:
        self.name = path.name
        self._entry = entry
        self._cache = cache or Cache()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.name} is missing", code="checkpoint.missing-file"
            ) from None
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._check_size(os.fstat(self._fd))
        except CheckpointError:
            self.close()
            raise

    def _check_size(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise self._damaged("is not a regular file")
        size = self._entry.bytes
        if found.st_size != size:
            raise self._damaged(f"has {found.st_size} bytes instead of {size}")
        if len(self._entry.blocks) != -(-size // BLOCK):
            raise self._damaged("is damaged: the manifest has digests of another number of blocks")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, start: int, stop: int) -> memoryview:
        """Return the bytes from `start` to `stop`, verified.

        Raises:
            CheckpointError: a block that holds one of them is damaged or cannot be read.
        """
        if not 0 <= start <= stop <= self._entry.bytes:
            raise self._damaged(f"is damaged: it has no bytes {start} to {stop}")
        first, last = start // BLOCK, max(start, stop - 1) // BLOCK
        if first == last:
            at = first * BLOCK
            return self._block(first)[start - at : stop - at]
        joined: memoryview = np.empty(stop - start, dtype=np.uint8).data
        for index in range(first, last + 1):
            at = index * BLOCK
            low, high = max(start, at), min(stop, at + BLOCK)
            block = self._block(index)
            joined[low - start : high - start] = block[low - at : high - at]
        return joined

    def read_all(self) -> bytes:
        return bytes(self.read(0, self._entry.bytes)) if self._entry.bytes else b""

    @property
    def size(self) -> int:
        return self._entry.bytes

    @property
    def num_blocks(self) -> int:
        return len(self._entry.blocks)

    def verify(self) -> None:
        """Verify every block.

        Raises:
            CheckpointError: one of them is damaged or cannot be read.
        """
        memory = bytearray(min(BLOCK, self._entry.bytes))
        for index in range(self.num_blocks):
            self.verify_block(index, memory)

    def verify_block(self, index: int, memory: Any) -> None:
        """Verify one block. Several threads may do this at the same time.

        Args:
            index: the number of the block.
            memory: memory for the block, which is overwritten.

        Raises:
            CheckpointError: it is damaged or cannot be read.
        """
        self._read_block(index, memory)

    def _block(self, index: int) -> memoryview:
        key = (self.name, index)
        found = self._cache.get(key)
        if found is None:
            # not a bytearray, which is filled with zeros first
            memory = np.empty(min(BLOCK, self._entry.bytes - index * BLOCK), dtype=np.uint8)
            found = self._read_block(index, memory)
            self._cache.put(key, found)
        return found

    def _read_block(self, index: int, memory: Any) -> memoryview:
        """Read a block into memory, verify it, and return it."""
        at = index * BLOCK
        data = view = memoryview(memory)[: min(BLOCK, self._entry.bytes - at)]
        try:
            while view:  # a read may return fewer bytes than were asked for
                count = os.preadv(self._fd, [view], at)
                if count == 0:
                    raise self._damaged("is shorter than when it was opened")
                view, at = view[count:], at + count
        except OSError as error:
            raise self._unreadable(error) from error
        if xxhash.xxh3_128_hexdigest(data) != self._entry.blocks[index]:
            first = index * BLOCK
            raise self._damaged(
                f"is damaged in bytes {first} to {first + len(data) - 1}: their xxh3 differs from "
                "the manifest"
            )
        return data

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name} {what}", code="checkpoint.damaged-file")

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.name} cannot be read: {error.strerror}", code="checkpoint.unreadable-file"
        )
