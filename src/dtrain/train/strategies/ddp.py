"""`ddp`: DistributedDataParallel, one process per device, gradients all-reduced."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dtrain.train.context import TrainContext
from dtrain.train.loss import NO_SAMPLES, LossModule, LossParts
from dtrain.train.strategies.base import Pending, Strategy
from dtrain.train.strategies.refusals import refuse_sparse

logger = logging.getLogger(__name__)

_BROADCAST_BYTES = 250 * 1024 * 1024  # as DDP itself


class DDPStrategy(Strategy):
    """torch's DDP, with three of its edges taken off.

    - A rank without samples, and a step whose gradients are not reduced during backward, join
      DDP's own reduction with a loss of zero over all parameters (`NO_SAMPLES`): the collectives
      are the same in every step.
    - Parameters without a gradient: the first step shows whether there are any. If so, every
      step reduces after backward, where a parameter that nobody used keeps no gradient, as in one
      process. Where it shows only later, that step's reduction is completed with zeros.
    - DDP lays its buckets out anew after the first backward, which changes the order of addition
      on 3 and more ranks: a resumed run would differ in the last bit. A backward of the zero
      loss before training makes that layout depend on the model alone.

    With one process it is the plain model.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self.gradient_scale = float(self.world_size)
        self._ddp: DistributedDataParallel | None = None
        self._buffers: list[torch.Tensor] = []
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._first_step = True
        self._some_unused = False
        self._met_unused = False
        """Whether this rank has met unused parameters and the others may not know yet."""
        self._reducing: torch.Tensor | None = None
        """The loss whose backward reduces the gradients of this step; None if none does."""

    def prepare(self, module: LossModule) -> None:
        """Wrap the loss."""
        super().prepare(module)
        if self.world_size == 1:
            return
        refuse_sparse(module.model, "ddp")
        self._buffers = list(module.model.buffers())
        self._parameters = {
            name: parameter
            for name, parameter in module.model.named_parameters()
            if parameter.requires_grad
        }
        self._ddp = DistributedDataParallel(
            module, init_sync=False, gradient_as_bucket_view=True, **_no_buffer_sync()
        )
        self._settle_buckets()

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """(sum, weight) of one micro-batch; the last one's backward reduces the gradients."""
        if self._ddp is None or not last or self._reduces_after_backward:
            return super().loss(batch, num_samples, last=last)
        result: LossParts = self._ddp(batch, num_samples)
        self._reducing = result[0]
        return result

    def finish_backward(self) -> None:
        """Make sure that the gradients are reduced, also where backward did not do it."""
        if self._ddp is None:
            return
        if self._reduces_after_backward:
            used = {name: p.grad is not None for name, p in self._parameters.items()}
            self._join_with_zero()
            self._forget_unused(used)
        elif self._reducing is None:
            self._join_with_zero()
        else:
            self._complete_reduction(self._reducing)
        self._first_step = False
        self._reducing = None

    def finish_step(self) -> None:
        """Give every rank the first rank's buffers, as DDP does before each forward.

        Here instead of there, so that replicas are equal at every step boundary.
        """
        if self._ddp is not None and self._buffers:
            group = dist.group.WORLD
            dist._broadcast_coalesced(group, self._buffers, _BROADCAST_BYTES, 0)

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Begin an all-reduce of a few scalars, in fp64, and of one of our own."""
        if self._ddp is None:
            return super().start_sum(values)
        vector = self._vector([*values, float(self._met_unused)])
        return Pending(vector, dist.all_reduce(vector, async_op=True), self._hear)

    def close(self) -> None:
        """Let go of DDP: gloo hangs in 6-8 % of exits that take the group down before it."""
        super().close()
        self._ddp = None
        self._buffers = []
        self._parameters = {}
        self._reducing = None

    @property
    def _reduces_after_backward(self) -> bool:
        return self._first_step or self._some_unused

    def _settle_buckets(self) -> None:
        """Let DDP lay out its buckets now; it does so at the first forward after a backward."""
        assert self._ddp is not None
        self._join_with_zero()
        # Gone before the new layout: DDP would turn them into views, and divides a view by W
        # where it multiplies anything else by 1/W, which differs in the last bit for W = 3.
        for parameter in self._parameters.values():
            parameter.grad = None
        with self._ddp.no_sync():
            self._ddp(NO_SAMPLES, 0)

    def _join_with_zero(self) -> None:
        assert self._ddp is not None
        zero, _ = self._ddp(NO_SAMPLES, 0)
        zero.backward()

    def _forget_unused(self, used: dict[str, bool]) -> None:
        """Take back the zero gradient of parameters that no rank used."""
        device = next(iter(self._parameters.values())).device
        flags = [*map(int, used.values()), int(any(used.values()))]
        *users, active = _summed(torch.tensor(flags, device=device))
        counts = dict(zip(used, users, strict=True))
        for name, count in counts.items():
            if count == 0:
                self._parameters[name].grad = None
        missing = [name for name, count in counts.items() if count < active]
        if missing and not self._some_unused:
            self._some_unused = True
            self._warn(missing)

    def _complete_reduction(self, loss: torch.Tensor) -> None:
        """Reduce what backward left over: DDP waits for every parameter on every rank."""
        assert self._ddp is not None
        try:
            self._ddp._check_reducer_finalized()
        except RuntimeError:
            used = _leaves(loss)
            unused = {name: p for name, p in self._parameters.items() if p not in used}
            torch.stack([p.sum().float() * 0 for p in unused.values()]).sum().backward()
            self._ddp._check_reducer_finalized()
            self._met_unused = True
            self._warn(list(unused))

    def _hear(self, sums: list[float]) -> list[float]:
        """Switch to reducing after backward together, once any rank has met unused parameters."""
        *values, met_unused = sums
        self._some_unused = self._some_unused or met_unused > 0
        return values

    def _warn(self, names: list[str]) -> None:
        if self.rank == 0 or self._met_unused:
            logger.warning(
                "parameters without a gradient in some step on some rank: %s. From now on "
                "gradients are reduced after backward instead of during it, which is slower; "
                "requires_grad_(False) on parameters that are never used avoids that",
                _shortened(names),
            )


def _leaves(loss: torch.Tensor) -> set[torch.Tensor]:
    """The parameters in the graph of a loss."""
    found, seen, ahead = set(), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return found


def _summed(flags: torch.Tensor) -> list[int]:
    dist.all_reduce(flags)
    return list(flags.tolist())


def _shortened(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _no_buffer_sync() -> dict[str, bool]:
    """DDP's switch for buffers, under its name in this torch (2.13 renamed it)."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
