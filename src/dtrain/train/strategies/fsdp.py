"""`fsdp`: FSDP2, parameters, gradients and optimizer state cut into one part per process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from dtrain.train.context import TrainContext
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.loss import LossModule, LossParts
from dtrain.train.precision import Precision
from dtrain.train.seeding import RandomState
from dtrain.train.strategies.base import (
    Pending,
    Strategy,
    broadcast_buffers,
    known_norm,
    refuse_sparse,
)
from dtrain.train.strategies.fsdp_gathers import Gathers
from dtrain.train.strategies.fsdp_wrapping import check_shardable, units
from dtrain.train.strategies.lent import lend
from dtrain.train.strategies.parameters import Usage

_NOTHING = object()
"""Instead of a batch: a forward without a loss."""


class FSDPStrategy(Strategy):
    """torch's `fully_shard`, with what it leaves to its user taken care of.

    - Each block of the model (see `units`) is gathered when its forward or backward needs it.
    - Gradients are summed, not averaged, so the loss contract holds as it stands.
    - Ranks may call different blocks (see `gathers`).
    - Every rank must run as many forwards as the others. Where ranks have unequal numbers of
      micro-batches, those with fewer run one again with a gradient of zero; a rank without any
      sample borrows one. Both are of the same step, so nothing is not a number there
      that is not so in the real gradient.
    - A parameter that some rank does not use counts as zero there; one that nobody uses keeps no
      gradient, as in one process.

    With one process it is the plain model.
    """

    meets_in_forward = True

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._root: torch.nn.Module | None = None
        self._sharded: list[FSDPModule] = []
        """Every block, and the root last."""
        self._gathers: Gathers | None = None
        self._buffers: list[torch.Tensor] = []
        self._usage = Usage({})
        self._precision = Precision(context.spec.train.precision, context.device)
        self._padding_forwards = 0
        """How many forwards this rank owes the others in this step."""
        self._borrows_batch = False
        """Whether some rank is without samples in this step and has yet to borrow one."""
        self._lender = 0
        """The rank that it borrows from, one with as many samples as any."""
        self._last_batch: tuple[Any, int] = (None, 0)
        """The micro-batch that fillers run again, and its size."""

    def shard(self, module: LossModule) -> None:
        """Replace the model's parameters by this rank's parts."""
        if self.world_size == 1:
            return
        refuse_sparse(module.model, "fsdp")
        check_shardable(module.model)
        mesh = init_device_mesh(self.context.device.type, (self.world_size,))
        self._root = _Root(module)
        for unit in [*units(module.model), self._root]:
            unit.register_forward_hook(_own_outputs)
            fully_shard(unit, mesh=mesh, mp_policy=_policy(unit))
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            self._sharded.append(unit)
        self._gathers = Gathers(module.model, self._sharded[-1])
        self._buffers = list(module.model.buffers())

    def prepare(self, module: LossModule) -> None:
        """Run one forward of nothing: the first one decides what FSDP takes for the root."""
        super().prepare(module)
        if self._root is None:
            return
        with torch.no_grad():
            self._root(_NOTHING, 0)
        for unit in self._sharded:  # the root stays gathered: its parameters would be others
            unit.reshard()
        self._usage = Usage(dict(module.model.named_parameters()))
        with self.whole():
            self._usage.watch(module.model)
        if hasattr(self._root, "set_reduce_scatter_unused_params"):  # since torch 2.13
            self._root.set_reduce_scatter_unused_params(True)

    def start_step(self, batch: GlobalBatch) -> None:
        """Find out how many forwards this rank lacks."""
        size = self.context.spec.train.micro_batch_size
        self._lender = batch.fullest()
        most = len(batch.micro_batches(self._lender, self.world_size, size))
        self._padding_forwards = most - len(self.micro_batches(batch))
        self._borrows_batch = not batch.reaches_every_rank(self.world_size)
        self._usage.clear()

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """(sum, weight) of one micro-batch; the last backward of a step reduces the gradients."""
        if self._root is None:
            return super().loss(batch, num_samples, last=last)
        self._hold((batch, num_samples))
        return self._forward(batch, num_samples, reduces=last and self._padding_forwards == 0)

    def finish_backward(self) -> None:
        """Run the forwards and backwards that this rank owes the others."""
        if self._root is None:
            return
        self._hold(None)
        for left in reversed(range(self._padding_forwards)):
            before = RandomState.capture()
            with self._precision():
                total, _ = self._forward(*self._last_batch, reduces=left == 0)
            total.backward(torch.zeros_like(total))
            before.restore()
        self._last_batch = (None, 0)
        assert self._gathers is not None
        self._gathers.finish_backward()

    def clip_gradients(
        self, parameters: Iterable[torch.nn.Parameter], max_norm: float
    ) -> torch.Tensor:
        """As in one process: the norm is over all parts of all parameters.

        On this rank's parts, with one all-reduce: torch's own takes 7 ms for 12 parameters, most
        of it in the dispatch of DTensor.
        """
        if self._root is None:
            return super().clip_gradients(parameters, max_norm)
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        squares = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for norm in torch._foreach_norm(parts):
            squares += norm.double().square()
        dist.all_reduce(squares)
        total = squares.sqrt()
        torch._foreach_mul_(parts, torch.clamp(max_norm / (known_norm(total) + 1e-6), max=1.0))
        return total

    def finish_step(self) -> None:
        broadcast_buffers(self._buffers)

    def start_sum(self, values: Sequence[float | torch.Tensor]) -> Pending:
        """Prepare a sum. It is made on `wait`: ranks with fillers come here before the others,
        and collectives must have one order."""
        if self._root is None:
            return super().start_sum(values)
        return _Later(lambda: self._vector([*values, *self._usage.flags()]), self._read_sums)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All blocks gathered on every rank, and no collective in any forward."""
        gathers = self._gathers
        if gathers is None:
            yield
            return
        for unit in self._sharded:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._sharded:
                unit.reshard()
                unit.set_reshard_after_forward(gathers.streams(unit), recurse=False)
            _forget_forwards(self._sharded)

    def close(self) -> None:
        super().close()
        self._root = self._gathers = None
        self._sharded, self._buffers = [], []
        self._usage = Usage({})

    def _forward(self, batch: Any, num_samples: int, *, reduces: bool) -> LossParts:
        assert isinstance(self._root, FSDPModule)
        assert self._gathers is not None
        self._root.set_requires_gradient_sync(reduces)
        with self._gathers.forward():
            result: LossParts = self._root(batch, num_samples)
        return result

    def _hold(self, given: tuple[Any, int] | None) -> None:
        """Keep a micro-batch for fillers; where some rank has none, all get the lender's first."""
        if self._borrows_batch:
            self._borrows_batch = False
            context = self.context
            self._last_batch = lend(self._lender, given, context.device, context.code_dir)
        elif given is not None:
            self._last_batch = given

    def _read_sums(self, sums: list[float]) -> list[float]:
        """The sums but for our own, which say whose zero gradients to take back."""
        end = len(sums) - len(self._usage)
        self._usage.forget_unused(sums[end:])
        return sums[:end]


class _Root(torch.nn.Module):
    """The whole loss, so that any method of the model may be called in it."""

    def __init__(self, loss: LossModule) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: Any, num_samples: int) -> LossParts | None:
        if batch is _NOTHING:
            return None
        result: LossParts = self.loss(batch, num_samples)
        return result


class _Later(Pending):
    def __init__(
        self, vector: Callable[[], torch.Tensor], read: Callable[[list[float]], list[float]]
    ) -> None:
        self._make = vector
        self._read = read

    def wait(self) -> list[float]:
        vector = self._make()
        dist.all_reduce(vector)
        return self._read(vector.tolist())


def _own_outputs(module: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
    """Copies of outputs that are views, as of an input when a block skips itself.

    FSDP hangs its backward on them, which an in-place operation on a view takes off again.
    """
    if not torch.is_grad_enabled():
        return outputs
    return tree_map_only(torch.Tensor, _own, outputs)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor.clone()


def _forget_forwards(sharded: list[FSDPModule]) -> None:
    """Clear the list of forwards along which backward gathers ahead.

    Ranks have unequal numbers of evaluation batches, and would gather unequal blocks.
    """
    for unit in sharded[-1:]:
        if hasattr(unit, "reset_iter_state"):  # since torch 2.13
            unit.reset_iter_state()
            return
    for unit in sharded:
        state = unit._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        if state._fsdp_param_group is not None:
            state._fsdp_param_group._post_forward_indices.clear()


def _policy(unit: torch.nn.Module) -> MixedPrecisionPolicy:
    """Gradients of parameters in 16 bits are added in fp32; all else is left to autocast.

    With `param_dtype` FSDP would gather in 16 bits, at half the traffic. But that makes 16-bit
    parameters of those that autocast keeps in fp32: a norm on fp32 inputs then raises (on the
    CPU), and elsewhere the training is another one than under `ddp`.
    """
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in unit.parameters())
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
