"""`fsdp`: FSDP2, parameters, gradients and optimizer state cut into one part per process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dtrain.train.context import TrainContext
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.loss import LossModule, LossParts
from dtrain.train.precision import Precision
from dtrain.train.seeding import RandomState
from dtrain.train.strategies.base import Pending, Strategy, broadcast_buffers, known_norm
from dtrain.train.strategies.fsdp_sharded import Sharded
from dtrain.train.strategies.lent import lend


class FSDPStrategy(Strategy):
    """torch's `fully_shard`, with the parts that it leaves to its user.

    - Each block of the model (see `fsdp_wrapping`) is gathered when its forward or backward needs
      it.
    - Gradients are summed, not averaged, so the loss contract holds unchanged.
    - Ranks may call different blocks (see `fsdp_gathers`).
    - Every rank must run the same number of forwards. If ranks have unequal numbers of
      micro-batches, those with fewer run their last one again with a gradient of zero. A rank
      without samples borrows a micro-batch. Both are from the same step, so they add no NaN that
      the real gradient does not have.
    - A parameter that a rank does not use counts as zero on that rank. A parameter that no rank
      uses gets no gradient, which is the same as in one process.

    With one process it is the plain model.
    """

    meets_in_forward = True

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._sharded: Sharded | None = None
        self._buffers: list[torch.Tensor] = []
        self._precision = Precision(context.spec.train.precision, context.device)
        self._padding_forwards = 0
        """The number of additional forwards that this rank runs to match the other ranks."""
        self._borrows_batch = False
        """Whether a rank has no samples in this step and has not borrowed a micro-batch yet."""
        self._lender = 0
        """The rank that lends the micro-batch; no rank has more samples."""
        self._last_batch: tuple[Any, int] = (None, 0)
        """The micro-batch that the additional forwards run again, and its size."""

    def shard(self, module: LossModule) -> None:
        """Replace the model's parameters by this rank's parts."""
        if self.world_size == 1:
            return
        options = self.context.spec.fsdp
        self._sharded = Sharded(module.model, module, self.context.device, self.world_size, options)
        self._buffers = list(module.model.buffers())

    def start_step(self, batch: GlobalBatch) -> None:
        """Compute the number of additional forwards of this rank."""
        size = self.context.spec.train.micro_batch_size
        self._lender = batch.fullest()
        most = len(batch.micro_batches(self._lender, self.world_size, size))
        self._padding_forwards = most - len(self.micro_batches(batch))
        self._borrows_batch = not batch.reaches_every_rank(self.world_size)
        if self._sharded is not None:
            self._sharded.usage.clear()

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """Return (sum, weight) of one micro-batch; a step's last backward reduces the gradients."""
        if self._sharded is None:
            return super().loss(batch, num_samples, last=last)
        self._hold((batch, num_samples))
        return self._forward(batch, num_samples, reduces=last and self._padding_forwards == 0)

    def finish_backward(self) -> None:
        """Run the additional forwards and backwards of this rank."""
        if self._sharded is None:
            return
        self._hold(None)
        for left in reversed(range(self._padding_forwards)):
            before = RandomState.capture()
            with self._precision():
                total, _ = self._forward(*self._last_batch, reduces=left == 0)
            total.backward(torch.zeros_like(total))
            before.restore()
        self._last_batch = (None, 0)
        self._sharded.finish_backward()

    def clip_gradients(
        self, parameters: Iterable[torch.nn.Parameter], max_norm: float
    ) -> torch.Tensor:
        """Clip with the norm over all parts of all parameters, the same norm as in one process.

        Each rank computes the norm of its own parts, and one all-reduce adds them. torch's own
        function takes 7 ms for 12 parameters, most of it in the dispatch of DTensor.
        """
        if self._sharded is None:
            return super().clip_gradients(parameters, max_norm)
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        squares = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for norm in torch._foreach_norm(parts):
            squares += norm.double().square()
        dist.all_reduce(squares, group=self._sharded.shard_group)
        total = squares.sqrt()
        scale = torch.clamp(max_norm / (known_norm(total) + 1e-6), max=1.0)
        for part in parts[:1]:  # with fsdp.cpu_offload they are on the CPU
            torch._foreach_mul_(parts, scale.to(part.device))
        return total

    def finish_step(self) -> None:
        broadcast_buffers(self._buffers)

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Prepare a sum that `wait` computes.

        Ranks with additional forwards get here before the others, and collectives must have the
        same order on all ranks.
        """
        if self._sharded is None:
            return super().start_sum(values)
        usage = self._sharded.usage
        return _DeferredSum(lambda: self._vector([*values, *usage.flags()]), self._read_sums)

    def whole(self) -> AbstractContextManager[None]:
        return super().whole() if self._sharded is None else self._sharded.whole()

    def close(self) -> None:
        super().close()
        self._sharded, self._buffers = None, []

    def _forward(self, batch: Any, num_samples: int, *, reduces: bool) -> LossParts:
        assert self._sharded is not None
        with self._sharded.forward(reduces=reduces):
            result: LossParts = self._sharded.root(batch, num_samples)
        return result

    def _hold(self, given: tuple[Any, int] | None) -> None:
        """Keep a micro-batch for the additional forwards.

        If a rank has no samples, it gets the lender's first micro-batch.
        """
        if self._borrows_batch:
            self._borrows_batch = False
            context = self.context
            self._last_batch = lend(self._lender, given, context.device, context.code_dir)
        elif given is not None:
            self._last_batch = given

    def _read_sums(self, sums: list[float]) -> list[float]:
        """Return the caller's sums. The other sums count which ranks used each parameter."""
        assert self._sharded is not None
        usage = self._sharded.usage
        end = len(sums) - len(usage)
        usage.forget_unused(sums[end:])
        return sums[:end]


class _DeferredSum(Pending):
    def __init__(
        self, vector: Callable[[], torch.Tensor], read: Callable[[list[float]], list[float]]
    ) -> None:
        self._make = vector
        self._read = read

    def wait(self) -> list[float]:
        vector = self._make()
        dist.all_reduce(vector)
        return self._read(vector.tolist())
