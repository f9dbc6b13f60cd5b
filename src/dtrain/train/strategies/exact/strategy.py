"""`exact`: the same bits on any number of processes that divides the number of virtual shards.

Floating-point sums depend on their order, and BLAS results on the size of a batch. So every
global batch is cut into V virtual shards, for any number of processes. Each shard has its own
random numbers, its own forward and backward, and its own BatchNorm statistics. The gradients of
the shards are sums, and all V are added in one fixed binary tree. So the result does not depend on
which process computes which shard, or on a resume with another number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import deterministic

from dtrain import catalog
from dtrain.errors import DtrainError, UsageError
from dtrain.train.context import TrainContext
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.loss import LossModule, LossParts
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.strategies.base import Pending, Strategy, refuse_sparse
from dtrain.train.strategies.exact.buffers import ShardBuffers
from dtrain.train.strategies.exact.exchange import Exchange
from dtrain.train.strategies.exact.flat_buffer import Flat, Layout, Pool
from dtrain.train.strategies.exact.shards import ShardStep, Sums
from dtrain.train.strategies.exact.tree import Node, tree_sum
from dtrain.train.strategies.parameters import Trainable, Usage

NUM_THREADS = 1
"""The number of threads in every layout.

A sum over a tensor is cut into as many parts as there are threads, and the launcher gives a rank
cores / ranks threads."""


class ExactStrategy(Strategy):
    """Trains virtual shards with keyed random numbers, and adds them in one fixed tree."""

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        num_shards = context.spec.train.virtual_shards
        problem = catalog.shard_problem("exact", num_shards, [self.world_size])
        if problem:
            raise UsageError(problem, code="plan.uneven-shards")
        share = num_shards // self.world_size
        self._num_shards = num_shards
        self._shards = range(self.rank * share, (self.rank + 1) * share)
        self._exchange = Exchange(num_shards, self.rank, self.world_size)
        self._pinned = Pinned(context.device)
        self._trainable: Trainable | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._pool = Pool(Layout([], self.world_size))
        self._buffers = ShardBuffers([])
        self._usage = Usage({})
        self._reduced: Flat | None = None
        """The memory of the gradients of the last step."""
        self._step = ShardStep(0, self._shards, [], self._pool)

    def prepare(self, module: LossModule) -> None:
        """Check that the model can be trained shard by shard."""
        super().prepare(module)
        refuse_sparse(module.model, "exact")
        _refuse_sync_batch_norm(module.model)
        self._trainable = Trainable(module.model)
        self._buffers = ShardBuffers(module.model.modules())
        self._usage = Usage(dict(module.model.named_parameters()))
        self._usage.watch(module.model)

    def micro_batches(self, batch: GlobalBatch) -> tuple[range, ...]:
        """Return the micro-batches of this rank's shards, one shard after another."""
        return tuple(part for shard in self._shards for part in self._pieces(batch, shard))

    def start_step(self, batch: GlobalBatch) -> None:
        if self._reduced is not None:
            self._pool.give(self._reduced)
            self._reduced = None
        if self._trainable is not None and self._trainable.changed():
            self._parameters = self._trainable.parameters()
            self._pool = Pool(Layout(self._parameters, self.world_size))
        ahead = [
            (shard, number, pieces)
            for shard in self._shards
            for pieces in [len(self._pieces(batch, shard))]
            for number in range(pieces)
        ]
        self._step = ShardStep(batch.step, self._shards, ahead, self._pool)
        self._buffers.start_step()
        self._usage.clear()

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        shard, number, pieces = self._step.ahead.popleft()
        if number == 0:
            self._finish_shard()
            gradients = self._step.begin(shard, alone=pieces == 1)
            for parameter, view in zip(self._parameters, gradients.views, strict=True):
                parameter.grad = view
            seed_everything(derive_seed("shard", self.context.spec.seed, self._step.number, shard))
        total, weight = super().loss(batch, num_samples, last=last)
        self._step.tally(total, weight)
        return total, weight

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Start to gather the loss and weight of every shard, instead of the rank's sums."""
        vector = self._vector([*self._step.tallies(), *values[2:]])
        if self.world_size == 1:
            return Pending(vector, None, self._read_sums)
        everyone = vector.new_empty(self.world_size * len(vector))
        work = dist.all_gather(list(everyone.chunk(self.world_size)), vector, async_op=True)
        return Pending(everyone, work, self._read_sums)

    def finish_backward(self) -> None:
        """Add up the gradients of all shards, and the buffers that their forwards changed."""
        self._finish_shard()
        nodes = self._step.finish()
        flags = [int(flag) for flag in self._usage.flags()]
        mine = [*flags, *self._buffers.counts()]
        counts = self._exchange.sum_counts(mine, self.context.device)
        self._reduced = self._sum([Node(n.level, n.index, n.value.gradients) for n in nodes])
        for node in nodes[1:]:
            self._pool.give(node.value.gradients)
        for parameter, view in zip(self._parameters, self._reduced.views, strict=True):
            parameter.grad = view
        self._usage.forget_unused(counts[: len(flags)])
        self._sum_buffers(nodes, counts[len(flags) :])
        # random numbers that the optimizer draws are the same on all ranks, too
        seed_everything(derive_seed("update", self.context.spec.seed, self._step.number))

    def close(self) -> None:
        super().close()
        self._trainable, self._parameters, self._usage = None, [], Usage({})
        self._pool, self._reduced = Pool(Layout([], self.world_size)), None
        self._buffers = ShardBuffers([])
        self._step = ShardStep(0, self._shards, [], self._pool)
        self._pinned.release()

    def _pieces(self, batch: GlobalBatch, shard: int) -> tuple[range, ...]:
        size = self.context.spec.train.micro_batch_size
        return batch.micro_batches(shard, self._num_shards, size)

    def _finish_shard(self) -> None:
        """End the shard that is being computed, if any."""
        if self._step.shard is not None:
            self._step.end(self._buffers.take(first=self._step.shard == 0))

    def _sum(self, nodes: list[Node[Flat]]) -> Flat:
        """Return the sum over all shards of all ranks, in the memory of the first node."""
        for vectors in zip(*(node.value.vectors for node in nodes), strict=True):
            parts = zip(nodes, vectors, strict=True)
            self._exchange.sum_vectors([Node(n.level, n.index, vector) for n, vector in parts])
        return nodes[0].value

    def _sum_buffers(self, nodes: list[Node[Sums]], counts: list[int]) -> None:
        """Set the new values of the buffers that the forward of any shard changed."""
        changed = [i for i, count in enumerate(counts) if count > 0]
        if not changed:
            return
        likes = self._buffers.likes()
        layout = Layout([likes[i] for i in changed], self.world_size)
        flats = []
        for node in nodes:
            flat = layout.make()
            for view, i in zip(flat.views, changed, strict=True):
                if (value := node.value.buffers.get(i)) is not None:
                    view.copy_(value)
            flats.append(Node(node.level, node.index, flat))
        total = self._sum(flats)
        sums = zip(changed, total.views, strict=True)
        self._buffers.finish_step({i: (view, counts[i]) for i, view in sums})

    def _read_sums(self, numbers: list[float]) -> list[float]:
        """Return [loss sum, weight, other sums] from the shards and other values of all ranks."""
        length = len(numbers) // self.world_size
        rows = [numbers[r * length : (r + 1) * length] for r in range(self.world_size)]
        end = 2 * len(self._shards)
        totals = tree_sum(x for row in rows for x in row[0:end:2])
        weights = tree_sum(x for row in rows for x in row[1:end:2])
        return [totals, weights, *map(sum, zip(*(row[end:] for row in rows), strict=True))]


def _refuse_sync_batch_norm(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            raise DtrainError(
                f"{name} is a SyncBatchNorm, which normalises over all processes; under strategy "
                "'exact' use BatchNorm, which sees one virtual shard at a time on any number of "
                "processes",
                code="strategy.sync-batch-norm",
            )


class Pinned:
    """Fixes global settings that would make results depend on the layout, until `release`.

    It sets one thread. On a GPU it also selects torch's deterministic algorithms and turns off the
    benchmark of convolutions. An operation without a deterministic version then raises an error
    with its name.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._fill = deterministic.fill_uninitialized_memory
        self._benchmark = torch.backends.cudnn.benchmark
        torch.set_num_threads(NUM_THREADS)
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first GEMM
            torch.use_deterministic_algorithms(True)
            deterministic.fill_uninitialized_memory = False  # it writes NaN into every new tensor
            torch.backends.cudnn.benchmark = False

    def release(self) -> None:
        torch.set_num_threads(self._threads)
        torch.use_deterministic_algorithms(self._deterministic)
        deterministic.fill_uninitialized_memory = self._fill
        torch.backends.cudnn.benchmark = self._benchmark
