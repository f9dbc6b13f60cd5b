"""Helpers of the tests of data in real ranks: feeds without a model, and ways to break them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dtrain import Task
from dtrain.errors import DtrainError, format_error
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.train.data.fetch import Request
from dtrain.train.data.pipeline import Feed, MapFeed
from dtrain.train.data.placement import GlobalBatch, Position


class Plain(Task):
    """Samples are their own ids."""

    def collate(self, samples: list[int]) -> list[int]:
        return samples


class Weighted(Plain):
    """Every sample as often as its id says."""

    def __init__(self, n: int) -> None:
        self.n = n

    def sample_weights(self) -> Any:
        return np.arange(self.n) + 1


@dataclass(frozen=True)
class Fault:
    """What one rank reads in one step instead of what it should."""

    kind: str
    """`double`: its first sample twice; `drop`: without its first; `swap`: another instead of
    the first; `epoch`: from here on, the order of the epoch before; `none`."""
    rank: int
    step: int
    """From 0."""

    def watch(self, requests: Iterable[Request], feed: Feed) -> Iterator[Request]:
        for step, request in enumerate(requests):
            yield self._broken(request, feed) if self._here(step) else request

    def _here(self, step: int) -> bool:
        return step == self.step or (self.kind == "epoch" and step > self.step)

    def _broken(self, request: Request, feed: Feed) -> Request:
        ids = request.samples
        if self.kind == "double":
            return replace(request, samples=np.concatenate([ids[:1], ids]))
        if self.kind == "drop":
            return replace(request, samples=ids[1:])
        if self.kind == "swap":
            return replace(request, samples=np.concatenate([[(ids[0] + 1) % 1000], ids[1:]]))
        order = feed.order.epoch(request.epoch).block(0, feed.order.num_samples)
        positions = np.argsort(order)[ids]
        return replace(request, samples=feed.order.epoch(request.epoch - 1).at(positions))


def spec(n: int, batch: int, *, workers: int = 0, **train: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "seed": 5,
            "args": {"n": n},
            "train": {"epochs": 2, "global_batch_size": batch, **train},
            "data": {"workers": workers},
        }
    )


@dataclass
class Fed:
    """How far a rank came, and what stopped it."""

    error: str | None
    step: int
    position: Position
    state: dict[str, Any]
    seen: list[list[int]]
    """This rank's samples of each step."""


def feed(
    job: JobSpec,
    fault: Fault | None = None,
    *,
    task: Task | None = None,
    start: Fed | None = None,
    steps: int | None = None,
    check_every: int | None = None,
    lie: int = 0,
) -> Fed:
    """Go through a job's data on this rank, with a check after each epoch and at the end.

    Args:
        job: its `args.n` is the number of samples.
        fault: what happens on the way.
        task: in place of `Plain`.
        start: where to go on from.
        steps: how many; None: to the end.
        check_every: steps after which a checkpoint would be written.
        lie: how many samples a resume begins too late.
    """
    ranks = RankInfo.from_env()
    made = MapFeed(range(job.args["n"]), task or Plain(), job, ranks, pin_memory=False)
    now = Fed(None, 0, Position(), {}, []) if start is None else start
    made.load_state_dict(now.state)
    position = replace(now.position, consumed=now.position.consumed + lie)

    def split(batch: GlobalBatch) -> tuple[range, ...]:
        return batch.micro_batches(ranks.rank, ranks.world_size, job.train.micro_batch_size)

    def watch(requests: Iterable[Request]) -> Iterator[Request]:
        here = fault is not None and fault.rank == ranks.rank
        return fault.watch(requests, made) if here and fault else iter(requests)

    step, seen = now.step, []
    try:
        for batch, parts, _ in itertools.islice(made.batches(step, position, split, watch), steps):
            seen.append([sample for _, part in parts for sample in part])
            step, position = batch.step + 1, batch.after
            if batch.ends_epoch or (check_every and step % check_every == 0):
                made.check()
        made.check()
    except DtrainError as error:
        return Fed(format_error(error), step, position, {}, seen)
    finally:
        made.close()
    return Fed(None, step, position, made.state_dict(), seen)
