"""The data pipeline of a trainer when every rank has its own stream."""

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
"""The steps of a run after which the ranks' samples are compared, in addition to epoch ends."""


class ShardedFeed(StreamFeed):
    """The feed of an iterable data set that shards itself over ranks (`data.stream: sharded`).

    A step takes each rank's share of the global batch from its own stream. Before each step the
    ranks exchange the number of samples that they have, which is smaller only where a stream ends.
    An epoch ends with the last of the streams. A rank whose stream has ended earlier is idle until
    then.
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
        self.proof = None  # dtrain distributes no positions; the content is compared instead
        self._overlap = Overlap(ranks) if self._compares else None
        self._num_blocks = 0
        self._read = [0] * ranks.world_size
        """The number of samples that each rank has read of this epoch."""
        self._ended = [False] * ranks.world_size
        """Whether the stream of each rank has ended in this epoch."""
        self._whole: list[int] | None = None
        """The number of samples that each rank has read of the epoch that has just ended."""

    def check(self) -> None:
        """Make sure, at the end of an epoch, that the ranks' samples are not the same."""
        if self._overlap is not None and self._whole is not None:
            self._overlap.compare()
            self._overlap.clear()

    def samples_read(self) -> list[int] | None:
        return self._whole

    def state_dict(self) -> dict[str, Any]:
        """Return the positions and states of all streams, see `Feed`. All ranks must call it."""
        states = collectives.gather_to_all(encoded(self._state))
        rows = zip(self._read, self._ended, states, strict=True)
        return {"streams": [{"read": n, "ended": e, "state": state} for n, e, state in rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict` with the same number of ranks.

        With another number of ranks the order has another name, and a resume is refused earlier.
        """
        if "streams" not in state:
            return
        streams = state["streams"]
        self._read = [each["read"] for each in streams]
        self._ended = [each["ended"] for each in streams]
        self._loaded = decoded(streams[self.ranks.rank]["state"])

    def _order(self) -> Order:
        return of_stream(f"a stream that shards itself over {self._world_size} ranks")

    def _own_seed(self) -> int:
        return self._derived  # otherwise the noise of all ranks would be the same

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
        everyone = collectives.gather_numbers(block.size, int(block.ends_epoch))
        shares = tuple(size for size, _ in everyone)
        start = sum(self._read)
        self._block, self._state = block, block.state
        self._read = [before + new for before, new in zip(self._read, shares, strict=True)]
        self._ended = [bool(ended) for _, ended in everyone]
        ends, self._whole = all(self._ended), None
        if ends:
            self._whole = self._read
            self._read, self._ended = [0] * self._world_size, [False] * self._world_size
        self._record(block)
        return GlobalBatch(
            step, block.epoch, start, start + sum(shares), ends_epoch=ends, shares=shares
        )

    def _record(self, block: Block) -> None:
        """Record the content of a block, and compare the ranks after one of the early steps."""
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
