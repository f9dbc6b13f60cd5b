"""The order of an epoch: a permutation that is computed, never stored.

It is a Feistel cipher over the smallest power of two that holds N, applied until the result is
below N (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4). It is
vectorised over blocks of positions. Memory does not grow with N, and any position costs the same:
a resume in the middle of an epoch of 1e12 samples is as fast as one at its start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtrain.train.data.hashing import Words, keys, mix, mix_all

PERMUTATION_VERSION = 1
"""The version of the map (n, seed, epoch) → order. Checkpoints hold it."""

MAX_SAMPLES = 2**63

_ROUNDS = 6
_TABLE_LIMIT = 1 << 16
"""The largest number of samples for which the order is a table (0.5 MB at most). A cipher on a few
bits shuffles badly, and a slice costs 0.5 µs instead of 200 for six rounds."""

_CHUNK = 1 << 15
"""The number of positions computed at a time. The four buffers then take 1 MB and stay in the
cache: blocks of 1e6 cost 40 to 90 ns a position instead of 160."""

Ids = NDArray[np.int64]


class Permutation:
    """The order in which one epoch visits the samples 0 … n-1.

    Args:
        n: the number of samples, 1 … 2**63.
        seed: the job's seed.
        epoch: the epoch, counted from 0.
        shuffle: False means the identity.
    """

    def __init__(self, n: int, seed: int, epoch: int, *, shuffle: bool = True) -> None:
        if not 1 <= n <= MAX_SAMPLES:
            raise ValueError(f"a permutation needs 1 … 2**63 samples, not {n}")
        self.n = n
        self._shuffle = shuffle
        self._keys = keys(_ROUNDS, "dtrain permutation", PERMUTATION_VERSION, seed, epoch)
        bits = max(1, (n - 1).bit_length())
        self._bits = (bits - bits // 2, bits // 2)
        masks = [np.array((1 << width) - 1, np.uint64) for width in self._bits]
        self._rounds = [(self._keys[i, ...], masks[i % 2]) for i in range(_ROUNDS)]
        self._table = self._make_table() if shuffle and n <= _TABLE_LIMIT else None

    def block(self, start: int, stop: int) -> Ids:
        if not 0 <= start <= stop <= self.n:
            raise ValueError(f"positions {start} … {stop} are not within 0 … {self.n}")
        if self._table is not None:
            return self._table[start:stop]
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: Ids) -> Ids:
        if self._table is not None:
            return self._table[positions]
        return self._walk(positions) if self._shuffle else positions

    def _walk(self, numbers: Ids) -> Ids:
        """Apply the cipher to each number until the result is below n."""
        words = np.ascontiguousarray(numbers.reshape(-1)).view(np.uint64)
        found = np.empty(words.shape, dtype=np.int64)
        limit = np.uint64(self.n)
        for start in range(0, words.size, _CHUNK):
            values = self._encrypt(words[start : start + _CHUNK])
            outside = np.flatnonzero(values >= limit)
            while outside.size:  # the domain is below 2n, so each walk ends at least half of them
                walked = self._encrypt(values[outside])
                values[outside] = walked
                outside = outside[walked >= limit]
            found[start : start + _CHUNK] = values
        return found.reshape(numbers.shape)

    def _encrypt(self, words: Words) -> Words:
        """Apply six Feistel rounds. The halves may differ by one bit and swap widths each round."""
        left, right, mixed, scratch = _halves(words, self._bits[1])
        for key, mask in self._rounds:
            np.bitwise_and(mix(right, key, mixed, scratch), mask, out=mixed)
            np.bitwise_xor(left, mixed, out=left)
            left, right = right, left
        return _joined(left, right, self._bits[1])

    def _make_table(self) -> Ids:
        """Return all samples sorted by a keyed 64-bit hash of their index; it is injective."""
        hashed = mix_all(np.arange(self.n, dtype=np.uint64), self._keys)
        return np.argsort(hashed).astype(np.int64)


def _halves(words: Words, right_bits: int) -> Words:
    """Return the left and the right half of each word, and two buffers of that size."""
    buffers = np.empty((4, *words.shape), dtype=np.uint64)
    np.right_shift(words, np.uint64(right_bits), out=buffers[0])
    np.bitwise_and(words, np.uint64((1 << right_bits) - 1), out=buffers[1])
    return buffers


def _joined(left: Words, right: Words, right_bits: int) -> Words:
    np.left_shift(left, np.uint64(right_bits), out=left)
    return np.bitwise_or(left, right, out=left)
