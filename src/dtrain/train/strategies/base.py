"""The interface of a strategy, with the behaviour of one process, and strategy `single`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from dtrain.errors import DtrainError, UsageError
from dtrain.train.context import TrainContext
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.loss import LossModule, LossParts

_BROADCAST_BYTES = 250 * 1024 * 1024  # DDP's own value


def known_norm(norm: torch.Tensor) -> torch.Tensor:
    """Return a norm to clip with. For NaN it is 0, which scales nothing."""
    return norm.nan_to_num(nan=0.0, posinf=math.inf)


def broadcast_buffers(buffers: list[torch.Tensor]) -> None:
    """Copy the first rank's buffers to every rank, between two steps.

    DDP does this before each forward; here replicas are equal at every step boundary.
    """
    if buffers:
        dist._broadcast_coalesced(dist.group.WORLD, buffers, _BROADCAST_BYTES, 0)


class Pending:
    def __init__(
        self,
        vector: torch.Tensor,
        work: Any = None,
        read: Callable[[list[float]], list[float]] = list,
    ) -> None:
        self._vector = vector
        self._work = work
        self._read = read

    def wait(self) -> list[float]:
        if self._work is not None:
            self._work.wait()
        return self._read(self._vector.tolist())


class Strategy:
    """Defines how the processes share the work of a step.

    It is made before the model. `shard` is called between the model and its optimizer, `prepare`
    before the first step. A step calls `start_step`, then `loss` for each of the rank's
    `micro_batches`, each followed by its backward, then `finish_backward`. After that, every
    rank's gradients times `gradient_scale` are the gradients of the sum over all ranks' losses.
    """

    meets_in_forward = False
    """Whether ranks communicate in every forward, so that all must run the same number."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.rank = context.ranks.rank
        self.world_size = context.ranks.world_size
        self.gradient_scale = 1.0
        """The number that the reduction divides gradients by."""
        self._module: LossModule | None = None

    def shard(self, module: LossModule) -> None:
        """Cut the model's parameters into one part per rank, if the strategy does that.

        It is called with the model on its device, before its optimizer is made.
        """

    def prepare(self, module: LossModule) -> None:
        """Take the loss module of the model, which is on its device and not yet trained."""
        self._module = module

    def micro_batches(self, batch: GlobalBatch) -> tuple[range, ...]:
        """Return the positions (in the epoch) of each micro-batch of this rank.

        An idle rank has no micro-batch.
        """
        size = self.context.spec.train.micro_batch_size
        return batch.micro_batches(self.rank, self.world_size, size)

    def start_step(self, batch: GlobalBatch) -> None:
        """Prepare a step. Every rank calls it before its first loss, also one without samples."""

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """Return (sum, weight) of the loss of one micro-batch.

        Args:
            batch: the micro-batch, on the device.
            num_samples: the number of samples in it.
            last: whether this is the rank's last micro-batch of the step.
        """
        assert self._module is not None
        result: LossParts = self._module(batch, num_samples)
        return result

    def finish_backward(self) -> None:
        """Complete the gradients. Every rank calls it after its last backward of a step.

        A rank without samples calls it too.
        """

    def clip_gradients(
        self, parameters: Iterable[torch.nn.Parameter], max_norm: float
    ) -> torch.Tensor:
        """Scale the reduced gradients down to a 2-norm of `max_norm`.

        If the norm is NaN, the gradients are not changed, so that its source can be found.

        Returns:
            The norm before clipping, a scalar.
        """
        given = list(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(given, max_norm, known_norm(norm))
        return norm

    def finish_step(self) -> None:
        """Finish a step. Every rank calls it after the optimizer's step."""

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Start to sum a few scalars over all ranks, in fp64.

        Args:
            values: the sum and the weight of this rank's losses in this step, then other numbers.
        """
        return Pending(self._vector(values))

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which every rank holds all parameters, for example to evaluate.

        All ranks enter and exit it together. Inside it, a rank may call the model any number of
        times.
        """
        return nullcontext()

    def close(self) -> None:
        """Release the wrapped model. The process group must not be destroyed before."""
        self._module = None

    def _vector(self, values: Sequence[float | torch.Tensor]) -> torch.Tensor:
        device = self.context.device
        if device.type == "cpu":
            return torch.tensor([float(value) for value in values], dtype=torch.float64)
        parts = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
        return torch.stack(parts)

    def _require_one_process(self, name: str) -> None:
        if self.world_size != 1:
            raise UsageError(
                f"strategy {name!r} trains in one process, but {self.world_size} processes were "
                "started; use strategy 'ddp'",
                code="strategy.one-process-only",
            )


class SingleStrategy(Strategy):
    """Trains in one process on one device."""

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._require_one_process("single")


def refuse_sparse(model: torch.nn.Module, strategy: str) -> None:
    """Raise if a layer makes sparse gradients."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(
            module, torch.nn.Embedding | torch.nn.EmbeddingBag
        ):
            raise DtrainError(
                f"{name} makes sparse gradients, which strategy {strategy!r} does not reduce; "
                "build it with sparse=False, or use strategy 'single'",
                code="strategy.sparse-gradients",
            )
