"""The digest of a live tensor, computed again from its bytes, by a process without torch."""

from __future__ import annotations

import numpy as np
import xxhash

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint.headers import Described

_CHUNK = 1 << 20
_GOLDEN, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def require_same(data: memoryview, piece: Described) -> None:
    """Make sure that bytes are those of the live tensor.

    Args:
        data: the bytes to write.
        piece: what they are, with a digest that `dtrain.train.digest.texts_of_each` made.

    Raises:
        CheckpointError: they are not.
    """
    live = piece.digest
    words = weighted_sum(data, piece.itemsize).tobytes() if live.startswith("wsum:") else data
    if f"{live.partition(':')[0]}:{xxhash.xxh3_64_intdigest(words):016x}" != live:
        raise CheckpointError(
            f"the copy of {piece.key} differs from the tensor in the training; its memory may be "
            "faulty",
            code="checkpoint.copy-differs",
        )


def weighted_sum(data: memoryview, itemsize: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return what `dtrain.train.digest.weighted_sum` returns for a tensor of these bytes."""
    numbers = np.frombuffer(data, dtype=_BITS[itemsize])
    total = np.zeros(2, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(numbers), _CHUNK):
            part = numbers[start : start + _CHUNK].astype(np.int64).view(np.uint64)
            position = np.arange(start + 1, start + 1 + len(part), dtype=np.uint64)
            factor = _mixed(position * _GOLDEN, 30) * _MIX
            factor = _mixed(factor, 27)
            total[0] += (part * (factor | np.uint64(1))).sum(dtype=np.uint64)
            high = (factor.view(np.int64) >> 32).view(np.uint64)
            total[1] += (part * (high | np.uint64(1))).sum(dtype=np.uint64)
    return total.view(np.int64)


def _mixed(
    factor: np.ndarray[tuple[int], np.dtype[np.uint64]], bits: int
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    shifted = (factor.view(np.int64) >> bits).view(np.uint64)  # the sign is shifted in
    return factor ^ shifted
