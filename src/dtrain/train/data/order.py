"""Which sample stands at each position of each epoch: shuffled, in turn, weighted, or custom.

A weighted draw is a function of (seed, epoch, position) alone, so any rank can make any part of an
epoch, and a resume begins anywhere: a keyed hash of the position gives 53 random bits, which are
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
"""Of the map (weights, seed, epoch, position) → sample; another version is another order."""


class EpochOrder(Protocol):
    def at(self, positions: Ids) -> Ids:
        """The samples at any positions; same shape, int64."""

    def block(self, start: int, stop: int) -> Ids:
        """The samples at positions start … stop-1, int64."""


class Order:
    """The order of every epoch of a training, the same in every process.

    Args:
        num_samples: positions in an epoch.
        name: what it is, in words; a resume is refused when they differ.
        make: the order of one epoch.
        once: whether every epoch holds each of the samples 0 … num_samples-1 exactly once.
        num_ids: every id is below this; 0: a stream, which nobody knows the length of.
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
        """What somebody should hear of it, in words."""
        self._make = make
        self._made: dict[int, EpochOrder] = {}

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch, kept with that of one other: loaders look ahead."""
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
    """The order in which a stream gives its samples; ids are positions."""
    endless = Permutation(MAX_SAMPLES, 0, 0, shuffle=False)
    return Order(MAX_SAMPLES, name, lambda _: endless, once=True, num_ids=0)


def weighted(weights: Any, num_samples: int, seed: int) -> Order:
    """As many draws as there are samples, with replacement; see `Weights`."""
    sums = Weights(weights, num_samples)
    name = f"weighted, version {WEIGHTED_VERSION}, weights {sums.digest}"
    make = functools.partial(WeightedEpoch, sums, seed)
    return Order(num_samples, name, make, once=False, num_ids=num_samples)


def custom(make: Callable[[int], Any], dataset_size: int) -> Order:
    """The order that a task gives.

    Args:
        make: from an epoch to a sequence of sample ids, or to an object with `__len__` and
            `block(start, stop)`; all epochs of one length.
        dataset_size: ids are below this.

    Raises:
        DtrainError: it gives something else, or ids that are not in the data set.
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
    """The order that a job's task and `data:` section ask for."""

    def make(epoch: int) -> Any:
        outer = RandomState.capture()
        seed_everything(derive_seed("order", spec.seed, epoch))  # the task may well draw
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
                f"{num_samples} samples; return one weight for each",
                code="data.bad-weights",
            )
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if wrong.size:
            raise DtrainError(
                f"sample_weights() returned {values[wrong[0]]:g} for sample {wrong[0]}; weights "
                "are finite and not negative",
                code="data.bad-weights",
            )
        self.digest = xxhash.xxh3_64_hexdigest(values.tobytes())
        self.sums: NDArray[np.float64] = np.cumsum(values)
        self.last = int(np.flatnonzero(values)[-1]) if self.sums[-1] > 0 else -1
        """The last sample with a weight."""
        if self.last < 0:
            raise DtrainError(
                "sample_weights() returned nothing but zeros: nothing can be drawn",
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


class _CustomEpoch:
    """What a task's `sample_order` returned for one epoch, checked where it is read."""

    def __init__(self, given: Any, dataset_size: int, length: int | None) -> None:
        self._given = given
        self._size = dataset_size
        self._ids: Ids | None = None
        if not callable(getattr(given, "block", None)):
            self._ids = _as_ids(given)
        self.n = len(given)
        if self.n == 0:
            raise DtrainError(
                "sample_order() returned no ids at all; an epoch needs one or more",
                code="data.bad-order",
            )
        if length is not None and self.n != length:
            raise DtrainError(
                f"sample_order() returned {self.n} ids for one epoch, {length} for the first; all "
                "epochs must have the same length, or a position would not tell how far training "
                "is",
                code="data.order-length-changes",
            )

    def block(self, start: int, stop: int) -> Ids:
        if self._ids is not None:
            return self._checked(self._ids[start:stop], start)
        ids = _as_ids(self._given.block(start, stop))
        if len(ids) != stop - start:
            raise DtrainError(
                f"block({start}, {stop}) of what sample_order() returned gave {len(ids)} ids, not "
                f"{stop - start}",
                code="data.bad-order",
            )
        return self._checked(ids, start)

    def at(self, positions: Ids) -> Ids:
        """The ids at any positions; one block for each run of consecutive positions."""
        if positions.size == 0:
            return positions
        cuts = np.flatnonzero(np.diff(positions) != 1) + 1
        runs = np.split(positions, cuts)
        return np.concatenate([self.block(int(run[0]), int(run[-1]) + 1) for run in runs])

    def fingerprint(self) -> str:
        """Of the whole order where it is at hand; else its own, or its first ids'."""
        if self._ids is not None:
            return xxhash.xxh3_64_hexdigest(self._ids.tobytes())
        own = getattr(self._given, "fingerprint", None)
        if own is not None:
            return str(own() if callable(own) else own)
        return xxhash.xxh3_64_hexdigest(self.block(0, min(self.n, 4096)).tobytes())

    def remark(self) -> str:
        """Ids that come again or never, where the order looks like one of all samples.

        They may do so; but one that is as long as the data set is likely meant to hold each once.
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
