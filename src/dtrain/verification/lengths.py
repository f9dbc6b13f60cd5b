"""Chooses short epochs for the runs of `dtrain verify`, which every layout can divide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dtrain import catalog
from dtrain.job.spec import JobSpec
from dtrain.verification.layouts import MIN_FORWARD_SAMPLES, Layout, last_chunk


def epoch_samples(spec: JobSpec, layouts: Sequence[Layout]) -> tuple[int, int]:
    """Return (training, evaluation) samples of an epoch.

    Training has two full batches and a short one, evaluation one full batch and a short one. If
    the job's batch is large enough, no share of the short batch is empty, and its shares are
    unequal. No shard, share or micro-batch has only one sample, unless one has in a full batch of
    the job.
    """
    batch = spec.train.global_batch_size
    rest = _rest(batch, [_training(spec, layout) for layout in layouts], before=0)
    seen = _rest(batch, [_evaluation(spec, layout) for layout in layouts], before=batch)
    return 2 * batch + rest, batch + seen


class _Cut:
    """The division of samples into forward passes."""

    def __init__(self, parts: int, size: int | None, *, size_first: bool = False) -> None:
        self.parts, self._size, self._size_first = parts, size, size_first

    def fewest(self, samples: int) -> int:
        """Return the fewest samples of any forward pass over so many; 0 if a part has none."""
        steps = (self._pieces, self._shares) if self._size_first else (self._shares, self._pieces)
        return min(each for first in steps[0](samples) for each in steps[1](first))

    def is_even(self, samples: int) -> bool:
        return self.parts > 1 and samples % self.parts == 0

    def _shares(self, samples: int) -> Iterator[int]:
        yield samples // self.parts
        yield -(-samples // self.parts)

    def _pieces(self, samples: int) -> Iterator[int]:
        yield min(samples, self._size or samples)
        yield last_chunk(samples, self._size or max(1, samples))


def _training(spec: JobSpec, layout: Layout) -> _Cut:
    fact = catalog.STRATEGIES.get(layout.strategy)
    in_one = fact is not None and fact.one_process
    parts = spec.train.virtual_shards if layout.is_exact else layout.parts
    return _Cut(parts, layout.micro_batch_size or spec.train.micro_batch_size, size_first=in_one)


def _evaluation(spec: JobSpec, layout: Layout) -> _Cut:
    """Return the division for evaluation.

    Every process evaluates its share in batches. `exact` evaluates all samples, in batches of the
    size of a shard.
    """
    parts = spec.train.virtual_shards if layout.is_exact else layout.world_size
    share = -(-spec.train.global_batch_size // parts)
    size = spec.eval.batch_size or layout.micro_batch_size or spec.train.micro_batch_size or share
    return _Cut(1 if layout.is_exact else parts, size)


def _rest(batch: int, cuts: Sequence[_Cut], before: int) -> int:
    """Return the size of the short batch, which is cut together with `before` samples before it."""

    def missing(rest: int) -> int:
        wanted = (
            (min(MIN_FORWARD_SAMPLES, cut.fewest(batch)), cut.fewest(before + rest)) for cut in cuts
        )
        return sum(max(0, enough - fewest) for enough, fewest in wanted)

    def evenly(rest: int) -> int:
        return sum(cut.is_even(before + rest) for cut in cuts)

    rests = range(1, min(batch, 8 * max((cut.parts for cut in cuts), default=1)))
    return min(rests, key=lambda rest: (missing(rest), evenly(rest), rest), default=1)
