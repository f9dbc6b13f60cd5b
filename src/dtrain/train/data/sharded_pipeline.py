"""The training data as a trainer sees it, when every rank has a stream of its own."""

from __future__ import annotations

from typing import Any

from dtrain.errors import UsageError
from dtrain.job.spec import JobSpec, sharded_problem
from dtrain.ranks import RankInfo
from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.data.exactly_once import Split
from dtrain.train.data.iterable_pipeline import StreamFeed, decoded, encoded
from dtrain.train.data.order import Order, of_stream
from dtrain.train.data.overlap import Overlap
from dtrain.train.data.placement import GlobalBatch, Position
from dtrain.train.data.stream import Block, Resume
from dtrain.train.seeding import derive_seed

_EARLY = (1, 4, 16, 64)
"""Steps of a run after which the ranks' samples are compared, besides the end of each epoch."""


class ShardedFeed(StreamFeed):
    """Of an iterable data set that gives each rank other samples (`data.stream: sharded`).

    A step takes each rank's share of the global batch from its own stream. Before it the ranks
    tell each other how many samples they have, which is fewer only where a stream ends. An epoch
    ends with the last of the streams; a rank whose stream has ended before is idle until then.
    """

    def __init__(
        self, dataset: Any, task: Task, spec: JobSpec, ranks: RankInfo, *, pin_memory: bool
    ) -> None:
        problem = sharded_problem(spec, [ranks.world_size])
        if problem:
            raise UsageError(problem, code="plan.sharded-stream")
        self._world_size = ranks.world_size
        self._derived = derive_seed("sharded", spec.seed, ranks.rank)
        super().__init__(dataset, task, spec, ranks, pin_memory=pin_memory)
        self.proof = None  # of positions that dtrain deals out; what is compared here is content
        self._overlap = Overlap(ranks) if self._compares else None
        self._num_blocks = 0
        self._read = [0] * ranks.world_size
        """Samples that each rank has read of this epoch."""
        self._ended = [False] * ranks.world_size
        """Whose stream has ended in this epoch."""
        self._whole: list[int] | None = None
        """Samples that each rank has read of the epoch that has just ended."""

    def check(self) -> None:
        """At the end of an epoch, make sure that the ranks' samples are not the same."""
        if self._overlap is not None and self._whole is not None:
            self._overlap.compare()
            self._overlap.clear()

    def samples_read(self) -> list[int] | None:
        return self._whole

    def state_dict(self) -> dict[str, Any]:
        """See `Feed`. Called by all ranks: the position is that of every stream."""
        states = collectives.gather_to_all(encoded(self._state))
        rows = zip(self._read, self._ended, states, strict=True)
        return {"streams": [{"read": n, "ended": e, "state": state} for n, e, state in rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on as many ranks; others have an order of another name."""
        if "streams" not in state:
            return
        streams = state["streams"]
        self._read = [each["read"] for each in streams]
        self._ended = [each["ended"] for each in streams]
        self._loaded = decoded(streams[self.ranks.rank]["state"])

    def _order(self) -> Order:
        return of_stream(f"a stream that shards itself over {self._world_size} ranks")

    def _own_seed(self) -> int:
        return self._derived  # or the noise of all ranks would be the same

    def _where(self, position: Position) -> Resume:
        rank = self.ranks.rank
        return Resume(position.epoch, self._read[rank], self._loaded, self._ended[rank])

    def _share(self, split: Split) -> tuple[int, tuple[range, ...]]:
        size = self.course.global_batch_size
        whole = GlobalBatch(0, 0, 0, size)
        mine = whole.part(self.ranks.rank, self._world_size)
        parts = (range(p.start - mine.start, p.stop - mine.start) for p in split(whole))
        return len(mine), tuple(parts)

    def _batch(self, step: int, block: Block) -> GlobalBatch:
        told = collectives.gather_numbers(block.size, int(block.ends_epoch))
        shares = tuple(size for size, _ in told)
        start = sum(self._read)
        self._block, self._state = block, block.state
        self._read = [before + new for before, new in zip(self._read, shares, strict=True)]
        self._ended = [bool(ended) for _, ended in told]
        ends, self._whole = all(self._ended), None
        if ends:
            self._whole = self._read
            self._read, self._ended = [0] * self._world_size, [False] * self._world_size
        self._look(block)
        return GlobalBatch(
            step, block.epoch, start, start + sum(shares), ends_epoch=ends, shares=shares
        )

    def _look(self, block: Block) -> None:
        """Keep what was read, and compare it early where that is due."""
        self._num_blocks += 1
        if self._overlap is not None:
            self._overlap.add(block.contents)
            if self._num_blocks in _EARLY:
                self._overlap.compare()

    def _compared(self, epoch: int, start: int, size: int) -> range:
        return range(start, start + size) if self._compares else range(0)

    @property
    def _keeps_state(self) -> bool:
        return True
