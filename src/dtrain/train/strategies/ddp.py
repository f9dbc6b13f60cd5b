"""`ddp`: DistributedDataParallel, one process per device, gradients all-reduced."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain.train.context import TrainContext
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.loss import NO_SAMPLES, LossModule, LossParts
from dtrain.train.strategies.base import Pending, Strategy, broadcast_buffers, refuse_sparse
from dtrain.train.strategies.parameters import Trainable


class DDPStrategy(Strategy):
    """torch's DDP, with a solution for four cases that DDP does not handle.

    - A rank without samples joins DDP's own reduction with a loss of zero over all parameters
      (`NO_SAMPLES`). So the collectives are the same in every step.
    - Parameters may have no gradient, in any step and on any rank. They join the reduction with
      zeros after backward. A parameter that no rank used gets no gradient, which is the same as
      in one process. No step depends on an earlier one, so a resumed run is bitwise equal.
    - Parameters may be frozen or unfrozen between two steps. DDP keeps the parameters that it was
      made with, so the loss is wrapped again.
    - DDP changes its layout of buckets after the first backward. On 3 and more ranks this changes
      the order of addition, so a resumed run would differ in the last bit. A backward of the zero
      loss before training makes the layout depend on the model alone.

    With one process it is the plain model.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self.gradient_scale = float(self.world_size)
        self._ddp: DistributedDataParallel | None = None
        self._counting: _CountingLoss | None = None
        """The module that DDP wraps."""
        self._buffers: list[torch.Tensor] = []
        self._trainable: Trainable | None = None
        self._parameters: list[torch.nn.Parameter] = []
        self._has_samples = False
        """Whether this rank has a loss in this step."""
        self._before: list[int] = []
        """Addresses of the gradients before the last micro-batch of this step."""

    def prepare(self, module: LossModule) -> None:
        super().prepare(module)
        if self.world_size == 1:
            return
        refuse_sparse(module.model, "ddp")
        self._buffers = list(module.model.buffers())
        self._trainable = Trainable(module.model)
        self._wrap()

    def start_step(self, batch: GlobalBatch) -> None:
        """Wrap the loss again if parameters were frozen or unfrozen."""
        self._wrap()

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """Return (sum, weight) of one micro-batch; the last backward reduces the gradients."""
        if self._ddp is None or not last:
            return super().loss(batch, num_samples, last=last)
        self._has_samples = True
        self._before = [_address(parameter.grad) for parameter in self._parameters]
        result: LossParts = self._ddp(batch, num_samples)
        return result

    def finish_backward(self) -> None:
        """Complete the reduction: DDP waits for every parameter on every rank."""
        if self._counting is None:
            return
        used = [parameter.grad is not None for parameter in self._parameters]
        if self._has_samples:
            # DDP replaces each gradient that backward computes by its own memory
            pairs = zip(self._parameters, self._before, strict=True)
            missing = [p for p, before in pairs if _address(p.grad) == before]
            self._counting.join(missing, uses_all=all(used))
        else:
            self._join_without_samples()
        if self._counting.some_unused_everywhere():
            self._forget_unused(used)
        self._has_samples = False

    def finish_step(self) -> None:
        broadcast_buffers(self._buffers)

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Start an all-reduce of a few scalars, in fp64."""
        if self._ddp is None:
            return super().start_sum(values)
        vector = self._vector(values)
        return Pending(vector, dist.all_reduce(vector, async_op=True))

    def close(self) -> None:
        """Release DDP: gloo hangs in 6-8 % of exits that destroy the group before it."""
        super().close()
        self._ddp = self._counting = self._trainable = None
        self._buffers = []
        self._parameters = []

    def _wrap(self) -> None:
        """Wrap the loss, unless the wrapper has the parameters that now require a gradient."""
        if self._trainable is None or not self._trainable.changed():
            return
        assert self._module is not None
        if self._ddp is not None:
            self._ddp._remove_autograd_hooks()
        for parameter in self._parameters:
            parameter.grad = None
        self._parameters = self._trainable.parameters()
        like = self._parameters[0] if self._parameters else torch.zeros(())
        self._counting = _CountingLoss(self._module, like)
        self._ddp = DistributedDataParallel(
            self._counting, init_sync=False, gradient_as_bucket_view=True, **_no_buffer_sync()
        )
        self._fix_bucket_layout()

    def _fix_bucket_layout(self) -> None:
        """Let DDP lay out its buckets now, with a backward and the forward after it."""
        assert self._ddp is not None
        assert self._counting is not None
        self._join_without_samples()
        # Gradients are removed before the new layout: DDP would turn them into views. It divides a
        # view by W but multiplies anything else by 1/W, which differs in the last bit for W = 3.
        for parameter in self._counting.parameters():
            parameter.grad = None
        with self._ddp.no_sync():
            self._ddp(NO_SAMPLES, 0)

    def _join_without_samples(self) -> None:
        assert self._ddp is not None
        assert self._counting is not None
        zero, _ = self._ddp(NO_SAMPLES, 0)
        zero.backward()
        self._counting.join([], uses_all=None)

    def _forget_unused(self, used: list[bool]) -> None:
        """Remove the zero gradient of parameters that no rank used."""
        users = torch.tensor(used, dtype=torch.int32, device=self.context.device)
        dist.all_reduce(users)
        for parameter, count in zip(self._parameters, users.tolist(), strict=True):
            if count == 0:
                parameter.grad = None


class _CountingLoss(torch.nn.Module):
    """The loss with an additional parameter, whose gradient counts ranks while DDP reduces it.

    So all ranks learn without a further exchange whether some parameter may have no gradient on
    any rank. It is the first parameter, in the bucket that DDP reduces last.
    """

    def __init__(self, loss: LossModule, like: torch.Tensor) -> None:
        super().__init__()
        # with the dtype of another parameter: each dtype has its own buckets
        self.counts = torch.nn.Parameter(torch.zeros(2, dtype=like.dtype, device=like.device))
        self.loss = loss

    def forward(self, batch: Any, num_samples: int) -> LossParts:
        result: LossParts = self.loss(batch, num_samples)
        return result

    def join(self, missing: Iterable[torch.nn.Parameter], *, uses_all: bool | None) -> None:
        """End the reduction of this step.

        Args:
            missing: the parameters that got no gradient in backward; they count as zero.
            uses_all: whether all parameters of this rank got a gradient; None without samples.
        """
        mine = self.counts.new_tensor([uses_all is False, uses_all is True])
        # the gradient is exactly 0 even where a parameter is infinite
        zeros = [parameter.sum().reshape(()).float() * 0 for parameter in missing]
        torch.stack([(self.counts * mine).sum().float(), *zeros]).sum().backward()

    def some_unused_everywhere(self) -> bool:
        """Return whether every rank with samples lacks a gradient; all ranks return the same."""
        assert self.counts.grad is not None
        lacking, complete = self.counts.grad.tolist()
        self.counts.grad = None
        return bool(lacking > 0 and complete == 0)


def _address(gradient: torch.Tensor | None) -> int:
    return -1 if gradient is None else gradient.data_ptr()


def _no_buffer_sync() -> dict[str, bool]:
    """Return DDP's option for buffers under its name in this torch (2.13 renamed it)."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
