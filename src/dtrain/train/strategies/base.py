"""What a strategy does for one optimizer step; `single`, which does no more than that."""

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

_BROADCAST_BYTES = 250 * 1024 * 1024  # as DDP itself


def known_norm(norm: torch.Tensor) -> torch.Tensor:
    """A norm to clip with: 0, which scales nothing, for NaN."""
    return norm.nan_to_num(nan=0.0, posinf=math.inf)


def broadcast_buffers(buffers: list[torch.Tensor]) -> None:
    """Give every rank the first rank's buffers, between two steps.

    DDP does so before each forward; here replicas are equal at every step boundary.
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
    """How the processes share the work of a step.

    It is made before the model. `shard` comes between the model and its optimizer, `prepare`
    before the first step. A step is: `start_step`; `loss` for each of the rank's `micro_batches`,
    each followed by its backward; then `finish_backward`, after which every rank's gradients,
    times `gradient_scale`, are those of the sum over all ranks' losses.
    """

    meets_in_forward = False
    """Whether ranks exchange something in every forward, so that they must run equally many."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.rank = context.ranks.rank
        self.world_size = context.ranks.world_size
        self.gradient_scale = 1.0
        """What the reduction divides by."""
        self._module: LossModule | None = None

    def shard(self, module: LossModule) -> None:
        """Cut the model's parameters into the ranks' parts, where a strategy does that.

        Called with the model on its device, before its optimizer is made.
        """

    def prepare(self, module: LossModule) -> None:
        """Take the loss over the model, which is on its device and not yet trained."""
        self._module = module

    def micro_batches(self, batch: GlobalBatch) -> tuple[range, ...]:
        """The positions (in the epoch) of this rank's micro-batches; none for an idle rank."""
        size = self.context.spec.train.micro_batch_size
        return batch.micro_batches(self.rank, self.world_size, size)

    def start_step(self, batch: GlobalBatch) -> None:
        """Called by every rank before the first loss of a step, also by one without samples."""

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """(sum, weight) of one micro-batch.

        Args:
            batch: on the device.
            num_samples: samples in it.
            last: whether this is the rank's last micro-batch of the step.
        """
        assert self._module is not None
        result: LossParts = self._module(batch, num_samples)
        return result

    def finish_backward(self) -> None:
        """Called by every rank after its last backward of a step, also by one without samples."""

    def clip_gradients(
        self, parameters: Iterable[torch.nn.Parameter], max_norm: float
    ) -> torch.Tensor:
        """Scale the reduced gradients down to a 2-norm of `max_norm`; the norm before, a scalar.

        A norm of NaN leaves them as they are, so that it can be told where it came from.
        """
        given = list(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(given, max_norm, known_norm(norm))
        return norm

    def finish_step(self) -> None:
        """Called by every rank after the optimizer's step."""

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Begin to sum a few scalars, in fp64, over all ranks.

        Args:
            values: the sum and the weight of this rank's losses in this step, then any others.
        """
        return Pending(self._vector(values))

    def whole(self) -> AbstractContextManager[None]:
        """A context in which every rank holds all parameters, as for evaluation.

        Entered and left by all ranks together; ranks may call the model as often as they like.
        """
        return nullcontext()

    def close(self) -> None:
        """Let go of the wrapped model; a process group must not be taken down before."""
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
                f"strategy {name!r} trains in one process, but {self.world_size} were started; "
                "use strategy 'ddp'",
                code="strategy.one-process-only",
            )


class SingleStrategy(Strategy):
    """One process, one device."""

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._require_one_process("single")


def refuse_sparse(model: torch.nn.Module, strategy: str) -> None:
    """Make sure that no layer makes sparse gradients."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(
            module, torch.nn.Embedding | torch.nn.EmbeddingBag
        ):
            raise DtrainError(
                f"{name} makes sparse gradients, which strategy {strategy!r} does not reduce; "
                "build it with sparse=False, or use strategy 'single'",
                code="strategy.sparse-gradients",
            )
