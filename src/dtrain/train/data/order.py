"""The sample at each position of each epoch: shuffled, sequential, weighted, or custom.

A weighted draw is a function of (seed, epoch, position) alone. So any rank can make any part of an
epoch, and a resume begins anywhere. A keyed hash of the position gives 53 random bits, which are
looked up in the running sum of the weights (inversion; Devroye, "Non-Uniform Random Variate
Generation", 1986, section III.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.task import Task
from dtrain.train.data.hashing import keys, mix_all
from dtrain.train.data.permutation import MAX_SAMPLES, PERMUTATION_VERSION, Ids, Permutation
from dtrain.train.seeding import RandomState, derive_seed, seed_everything
from dtrain.words import few

WEIGHTED_VERSION = 1
"""The version of the map (weights, seed, epoch, position) → sample, and so of the order."""


class EpochOrder(Protocol):
    def at(self, positions: Ids) -> Ids:
        """Return the samples at any positions, in the same shape; int64."""

    def block(self, start: int, stop: int) -> Ids:
        """Return the samples at positions start … stop-1; int64."""


class Order:
    """The order of every epoch of a training, the same in every process.

    Args:
        num_samples: the number of positions in an epoch.
        name: a description; a resume with another one is refused.
        make: returns the order of one epoch.
        once: whether every epoch holds each of the samples 0 … num_samples-1 exactly once.
        num_ids: a number that every id is below; 0 for a stream, whose length is unknown.
    """

    def __init__(
        self,
        num_samples: int,
        name: str,
        make: Callable[[int], EpochOrder],
        *,
        once: bool,
        num_ids: int,
    ) -> None:
        self.num_samples = num_samples
        self.num_ids = num_ids
        self.name = name
        self.once = once
        self.remark = ""
        """A warning about the order; empty if there is none."""
        self._make = make
        self._made: dict[int, EpochOrder] = {}

    def epoch(self, epoch: int) -> EpochOrder:
        """Return the order of one epoch. Two are cached, because loaders read ahead."""
        if epoch not in self._made:
            while len(self._made) > 1:
                del self._made[next(iter(self._made))]
            self._made[epoch] = self._make(epoch)
        return self._made[epoch]


def shuffled(num_samples: int, seed: int) -> Order:
    name = f"shuffled, permutation version {PERMUTATION_VERSION}"
    make = functools.partial(Permutation, num_samples, seed)
    return Order(num_samples, name, make, once=True, num_ids=num_samples)


def in_turn(num_samples: int) -> Order:
    plain = Permutation(num_samples, 0, 0, shuffle=False)
    return Order(num_samples, "not shuffled", lambda _: plain, once=True, num_ids=num_samples)


def of_stream(name: str = "a stream") -> Order:
    """Return the order of a stream's own samples; ids are positions."""
    endless = Permutation(MAX_SAMPLES, 0, 0, shuffle=False)
    return Order(MAX_SAMPLES, name, lambda _: endless, once=True, num_ids=0)


def weighted(weights: Any, num_samples: int, seed: int) -> Order:
    """Return an order of `num_samples` draws with replacement; see `Weights`."""
    sums = Weights(weights, num_samples)
    name = f"weighted, version {WEIGHTED_VERSION}, weights {sums.digest}"
    make = functools.partial(WeightedEpoch, sums, seed)
    return Order(num_samples, name, make, once=False, num_ids=num_samples)


def custom(make: Callable[[int], Any], dataset_size: int) -> Order:
    """Return the order that a task defines.

    Args:
        make: returns, for an epoch, a sequence of sample ids, or an object with `__len__` and
            `block(start, stop)`. All epochs must have the same length.
        dataset_size: the number of samples; ids must be below it.

    Raises:
        DtrainError: `make` returned something else, or ids that are not in the data set.
    """
    first = _CustomEpoch(make(0), dataset_size, None)
    order = Order(
        first.n,
        f"custom, {first.n} positions, {first.fingerprint()}",
        lambda epoch: _CustomEpoch(make(epoch), dataset_size, first.n),
        once=False,
        num_ids=dataset_size,
    )
    order._made[0] = first
    order.remark = first.remark()
    return order


def order_of(task: Task, dataset_size: int, spec: JobSpec) -> Order:
    """Return the order that a job's task and `data:` section request."""

    def make(epoch: int) -> Any:
        outer = RandomState.capture()
        seed_everything(derive_seed("order", spec.seed, epoch))  # the task may draw random numbers
        try:
            return task.sample_order(spec.seed, epoch)
        finally:
            outer.restore()

    own, weights = make(0), task.sample_weights()
    if own is not None and weights is not None:
        raise DtrainError(
            "the task has sample_order() and sample_weights(), but only one of them can decide the "
            "order; remove the other",
            code="data.two-orders",
        )
    if own is not None:
        return custom(make, dataset_size)
    if weights is None:
        return shuffled(dataset_size, spec.seed) if spec.data.shuffle else in_turn(dataset_size)
    if not spec.data.shuffle:
        raise DtrainError(
            "data.shuffle is false, but the task has sample_weights(), whose draws are random; "
            "remove one of them",
            code="data.weights-without-shuffle",
        )
    return weighted(weights, dataset_size, spec.seed)


class Weights:
    """The running sum of the weights of all samples: 8 bytes a sample in every process.

    Args:
        weights: one number a sample, not negative, as any array-like.
        num_samples: the required number of weights.

    Raises:
        DtrainError: the weights are not `num_samples` valid numbers.
    """

    def __init__(self, weights: Any, num_samples: int) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (num_samples,):
            raise DtrainError(
                f"sample_weights() returned shape {values.shape}, but train_dataset() has "
                f"{num_samples} samples; return one weight for each",
                code="data.bad-weights",
            )
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if wrong.size:
            raise DtrainError(
                f"sample_weights() returned {values[wrong[0]]:g} for sample {wrong[0]}; weights "
                "must be finite and not negative",
                code="data.bad-weights",
            )
        self.digest = xxhash.xxh3_64_hexdigest(values.tobytes())
        self.sums: NDArray[np.float64] = np.cumsum(values)
        self.last = int(np.flatnonzero(values)[-1]) if self.sums[-1] > 0 else -1
        """The last sample with a weight above 0."""
        if self.last < 0:
            raise DtrainError(
                "sample_weights() returned only zeros: no sample can be drawn",
                code="data.bad-weights",
            )


class WeightedEpoch:
    def __init__(self, weights: Weights, seed: int, epoch: int) -> None:
        self.n = len(weights.sums)
        self._weights = weights
        self._keys = keys(3, "dtrain weighted", WEIGHTED_VERSION, seed, epoch)

    def block(self, start: int, stop: int) -> Ids:
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: Ids) -> Ids:
        """Return the samples at any positions, in the same shape; int64.

        It takes 0.4 µs a position with 1e6 weights, 0.8 with 1e7: the lookup misses the cache.
        Sorted targets halve the misses.
        """
        words = mix_all(positions.reshape(-1).astype(np.uint64), self._keys)
        sums = self._weights.sums
        targets = (words >> np.uint64(11)).astype(np.float64) * (sums[-1] / 2.0**53)
        ascending = np.argsort(targets)
        found = np.empty(targets.shape, dtype=np.int64)
        found[ascending] = np.searchsorted(sums, targets[ascending], side="right")
        # rounding may raise a target to the total sum
        np.minimum(found, self._weights.last, out=found)
        return found.reshape(positions.shape)


class _CustomEpoch:
    """The order that a task's `sample_order` returned for one epoch, checked when it is read."""

    def __init__(self, given: Any, dataset_size: int, length: int | None) -> None:
        self._given = given
        self._size = dataset_size
        self._ids: Ids | None = None
        if not callable(getattr(given, "block", None)):
            self._ids = _as_ids(given)
        self.n = len(given)
        if self.n == 0:
            raise DtrainError(
                "sample_order() returned no ids; an epoch needs at least one",
                code="data.bad-order",
            )
        if length is not None and self.n != length:
            raise DtrainError(
                f"sample_order() returned {self.n} ids for one epoch, {length} for the first; all "
                "epochs must have the same length, because a resume counts positions",
                code="data.order-length-changes",
            )

    def block(self, start: int, stop: int) -> Ids:
        if self._ids is not None:
            return self._checked(self._ids[start:stop], start)
        ids = _as_ids(self._given.block(start, stop))
        if len(ids) != stop - start:
            raise DtrainError(
                f"block({start}, {stop}) of the object that sample_order() returned gave "
                f"{len(ids)} ids, not {stop - start}",
                code="data.bad-order",
            )
        return self._checked(ids, start)

    def at(self, positions: Ids) -> Ids:
        """Return the ids at any positions, reading a block per run of consecutive positions."""
        if positions.size == 0:
            return positions
        cuts = np.flatnonzero(np.diff(positions) != 1) + 1
        runs = np.split(positions, cuts)
        return np.concatenate([self.block(int(run[0]), int(run[-1]) + 1) for run in runs])

    def fingerprint(self) -> str:
        """Return a fingerprint of all ids if they are in memory, else its own or of 4,096 ids."""
        if self._ids is not None:
            return xxhash.xxh3_64_hexdigest(self._ids.tobytes())
        own = getattr(self._given, "fingerprint", None)
        if own is not None:
            return str(own() if callable(own) else own)
        return xxhash.xxh3_64_hexdigest(self.block(0, min(self.n, 4096)).tobytes())

    def remark(self) -> str:
        """Return a warning about repeated and missing ids in an order that should have each once.

        Repeated ids are allowed. But an order that is as long as the data set is probably meant to
        have each id once.
        """
        if self._ids is None or self.n != self._size:
            return ""
        counts = np.bincount(self._checked(self._ids, 0), minlength=self._size)
        again, never = np.flatnonzero(counts > 1), np.flatnonzero(counts == 0)
        if not again.size:
            return ""
        often = "twice" if counts.max() == 2 else "more than once"
        return (
            f"sample_order(): {len(again)} {'id comes' if len(again) == 1 else 'ids come'} {often} "
            f"({few(again.tolist())}), {len(never)} never ({few(never.tolist())})"
        )

    def _checked(self, ids: Ids, start: int) -> Ids:
        outside = np.flatnonzero((ids < 0) | (ids >= self._size))
        if outside.size:
            raise DtrainError(
                f"sample_order() puts sample {ids[outside[0]]} at position {start + outside[0]}, "
                f"but train_dataset() has samples 0 to {self._size - 1}",
                code="data.bad-order",
            )
        return ids


def _as_ids(given: Any) -> Ids:
    if isinstance(given, range):
        return np.arange(given.start, given.stop, given.step, dtype=np.int64)
    try:
        ids = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise DtrainError(
            f"sample_order() returned {type(given).__name__}: {error}", code="data.bad-order"
        ) from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise DtrainError(
            f"sample_order() returned {type(given).__name__}, read as {ids.dtype} of shape "
            f"{ids.shape}; return a sequence of sample ids, or an object with __len__ and "
            "block(start, stop)",
            code="data.bad-order",
        )
    return ids.astype(np.int64, copy=False)
