"""Samples drawn with replacement, as often as their weights say, without a stored draw.

The draw at a position is a function of (seed, epoch, position) alone, so any rank can make any
part of it, and a resume begins anywhere: a keyed hash of the position gives 53 random bits, which
are looked up in the running sum of the weights (inversion; Devroye, "Non-Uniform Random Variate
Generation", 1986, section III.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtrain.errors import DtrainError
from dtrain.train.data.hashing import keys, mix_all
from dtrain.train.data.permutation import Ids

WEIGHTED_VERSION = 1
"""Of the map (weights, seed, epoch, position) → sample; another version is another order."""


class Weights:
    """The weights of all samples, as their running sum: 8 bytes a sample in every process.

    Args:
        weights: one number a sample, not negative, any array-like.
        num_samples: how many there must be.

    Raises:
        DtrainError: they are not `num_samples` numbers that one can draw by.
    """

    def __init__(self, weights: Any, num_samples: int) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (num_samples,):
            raise DtrainError(
                f"sample_weights() returned shape {values.shape}, but train_dataset() has "
                f"{num_samples} samples; return one weight for each"
            )
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if wrong.size:
            raise DtrainError(
                f"sample_weights() returned {values[wrong[0]]:g} for sample {wrong[0]}; weights "
                "are finite and not negative"
            )
        self.digest = xxhash.xxh3_64_hexdigest(values.tobytes())
        self.sums: NDArray[np.float64] = np.cumsum(values)
        self.last = int(np.flatnonzero(values)[-1]) if self.sums[-1] > 0 else -1
        """The last sample with a weight."""
        if self.last < 0:
            raise DtrainError("sample_weights() returned nothing but zeros: nothing can be drawn")


class WeightedEpoch:
    """One epoch of weighted draws, as many as there are samples."""

    def __init__(self, weights: Weights, seed: int, epoch: int) -> None:
        self.n = len(weights.sums)
        self._weights = weights
        self._keys = keys(3, "dtrain weighted", WEIGHTED_VERSION, seed, epoch)

    def block(self, start: int, stop: int) -> Ids:
        """The samples at positions start … stop-1, int64, shape (stop - start,)."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: Ids) -> Ids:
        """The samples at any positions; same shape, int64.

        Costs 0.4 µs a position with 1e6 weights, 0.8 with 1e7: the lookup misses the cache, half
        as often when it goes through the sums in order.
        """
        words = mix_all(positions.reshape(-1).astype(np.uint64), self._keys)
        sums = self._weights.sums
        targets = (words >> np.uint64(11)).astype(np.float64) * (sums[-1] / 2.0**53)
        in_order = np.argsort(targets)
        found = np.empty(targets.shape, dtype=np.int64)
        found[in_order] = np.searchsorted(sums, targets[in_order], side="right")
        # rounding may lift a target to the very sum
        np.minimum(found, self._weights.last, out=found)
        return found.reshape(positions.shape)
