"""Keyed 64-bit mixing of whole arrays: the only source of pseudo-random words for data."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

# arrays without dimensions: a call with a NumPy scalar takes twice as long, 1.4 µs instead of 0.7
_ODD = np.array(0x9E3779B97F4A7C15, np.uint64), np.array(0xBF58476D1CE4E5B9, np.uint64)
_SHIFTS = np.array(32, np.uint64), np.array(29, np.uint64)


@functools.lru_cache(maxsize=32)
def keys(num_keys: int, *parts: int | str) -> Words:
    """Return at most 8 independent 64-bit keys, a hash of any words and numbers.

    Sums of seeds collide: in torch's DistributedSampler seed 1 epoch 1 is seed 2 epoch 0. Hashes of
    the parts as text do not.
    """
    text = " ".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8 * num_keys).digest()
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    words.flags.writeable = False  # cached: hashing for every batch would cost 5 µs
    return words


def mix(words: Words, key: Words, out: Words, scratch: Words) -> Words:
    """Apply a keyed finaliser after splitmix64 (Steele, Lea, Flood, 2014); it is a bijection.

    Args:
        words: the input, in any shape; unchanged unless it is also `out`.
        key: one word, as an array without dimensions.
        out: the output, in the same shape.
        scratch: a buffer of the same shape. A call without new temporaries is a third faster.
    """
    np.bitwise_xor(words, key, out=out)
    np.multiply(out, _ODD[0], out=out)
    np.right_shift(out, _SHIFTS[0], out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, _ODD[1], out=out)
    np.right_shift(out, _SHIFTS[1], out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    return out


def mix_all(words: Words, round_keys: Words) -> Words:
    out, scratch = np.empty_like(words), np.empty_like(words)
    for index in range(len(round_keys)):
        words = mix(words, round_keys[index, ...], out, scratch)
    return words
