"""A model cut by `fully_shard` into one part per process, with what that leaves to its user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only

from dtrain.train.strategies.base import refuse_sparse
from dtrain.train.strategies.fsdp_gathers import Gathers, gather, reduce
from dtrain.train.strategies.fsdp_wrapping import check_shardable, units
from dtrain.train.strategies.parameters import Usage

_NOTHING = object()
"""Instead of a batch: a forward without a step."""


class Sharded:
    """A model of which each process holds a part, cut block by block (see `units`).

    A step is a forward of `root` in `forward`, its backward, and `finish_backward`. One of manual
    optimization runs between `unshard` and `reshard`, with `reduce` after each backward, and
    resharded during each update.

    Args:
        model: on its device; its optimizer is made afterwards. Its parameters become parts, under
            the same names.
        step: the module whose forward is the forward of a training step: the model, or what
            holds it. Any method of the model may be called in it.
        device: of the model.
        world_size: the number of processes.
        divide_by: what the sum of the processes' gradients is divided by.
        manual: whether backwards and updates are made inside of a step.

    Raises:
        DtrainError: the model has what cannot be cut.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        step: torch.nn.Module,
        device: torch.device,
        world_size: int,
        *,
        divide_by: float = 1.0,
        manual: bool = False,
    ) -> None:
        refuse_sparse(model, "fsdp")
        check_shardable(model)
        mesh = init_device_mesh(device.type, (world_size,))
        self.root: Any = _Root(step)
        """The step, to be called in `forward`."""
        self._units: list[FSDPModule] = []
        """Every block, and the root last."""
        for unit in [*units(model), self.root]:
            unit.register_forward_hook(_own_outputs)
            fully_shard(unit, mesh=mesh, mp_policy=_policy(unit))
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(divide_by)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            self._units.append(unit)
        self._gathers = Gathers(model, self.root)
        self._become_root()
        self._model = model
        self._parts = dict(model.named_parameters())
        self.usage = Usage({} if manual else self._parts)
        """Which parameters get a gradient in a step without manual optimization."""
        if not manual:
            with self.whole():
                self.usage.watch(model)
            if hasattr(self.root, "set_reduce_scatter_unused_params"):  # since torch 2.13
                self.root.set_reduce_scatter_unused_params(True)

    def _become_root(self) -> None:
        """Run one forward of nothing: the first one decides what FSDP takes for the root."""
        with torch.no_grad():
            self.root(_NOTHING)
        for unit in self._units:  # the root stays gathered: its parameters would be others
            unit.reshard()

    @contextmanager
    def forward(self, *, reduces: bool) -> Iterator[None]:
        """Around each forward of a step; every process runs as many.

        Args:
            reduces: whether its backward is the last one of the step, which reduces the gradients.
        """
        self.root.set_requires_gradient_sync(reduces)
        with self._gathers.forward():
            yield

    def finish_backward(self) -> None:
        """After the last backward of a step."""
        self._gathers.finish_backward()

    def unshard(self) -> None:
        """Make the parameters whole ones, on all processes; what is whole stays as it is."""
        gather(self._units)

    def reshard(self) -> None:
        """The inverse of `unshard`; what was frozen or toggled in between stays so."""
        for name, parameter in self._model.named_parameters():
            self._parts[name].requires_grad_(parameter.requires_grad)
        for unit in self._units:
            unit.reshard()
        _forget_forwards(self._units)

    def toggled(self) -> None:
        """After `requires_grad` of parts was set, while the parameters are whole."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._parts[name].requires_grad)

    def reduce(self) -> None:
        """After a backward while unsharded: add its gradients to those of the parts."""
        parameters = list(self._model.parameters())
        used = torch.tensor([int(each.grad is not None) for each in parameters])
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        for parameter, by_any in zip(parameters, used.tolist(), strict=True):
            if by_any and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        reduce(self._units)
        self.unshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All blocks gathered on every rank, and no collective in any forward."""
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.reshard()
                unit.set_reshard_after_forward(self._gathers.streams(unit), recurse=False)
            _forget_forwards(self._units)


class _Root(torch.nn.Module):
    """A step as one module, so that any method of the model may be called in it."""

    def __init__(self, step: torch.nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, *given: Any, **named: Any) -> Any:
        return None if given and given[0] is _NOTHING else self.step(*given, **named)


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
