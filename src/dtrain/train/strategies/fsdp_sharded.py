"""A model that `fully_shard` cuts into one part per process."""

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
"""Used in place of a batch: the forward does not call the step."""


class Sharded:
    """A model of which each process holds a part, cut block by block (see `units`).

    A step is a forward of `root` in `forward`, its backward, and `finish_backward`. A step of
    manual optimization runs between `unshard` and `reshard`, with `reduce` after each backward.
    Each update runs resharded.

    Args:
        model: the model, on its device. Its parameters become parts under the same names. Its
            optimizer is made afterwards.
        step: the module whose forward is the forward of a training step: the model, or a module
            that holds it. The step may call any method of the model.
        device: the device of the model.
        world_size: the number of processes.
        divide_by: the number that the sum of the processes' gradients is divided by.
        manual: whether backwards and updates run inside a step.

    Raises:
        DtrainError: a part of the model cannot be cut.
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
        """The step as a module, which the caller runs inside `forward`."""
        self._units: list[FSDPModule] = []
        """Every block, then the root."""
        for unit in [*units(model), self.root]:
            unit.register_forward_hook(_own_outputs)
            fully_shard(unit, mesh=mesh, mp_policy=_policy(unit))
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(divide_by)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
            self._units.append(unit)
        self._gathers = Gathers(model, self.root)
        self._become_root()
        self._model = model
        self._parts = dict(model.named_parameters())
        self.usage = Usage({} if manual else self._parts)
        """The parameters that get a gradient in a step; unused in manual optimization."""
        if not manual:
            with self.whole():
                self.usage.watch(model)
            if hasattr(self.root, "set_reduce_scatter_unused_params"):  # since torch 2.13
                self.root.set_reduce_scatter_unused_params(True)

    def _become_root(self) -> None:
        """Run an empty forward: the first forward decides which module is FSDP's root."""
        with torch.no_grad():
            self.root(_NOTHING)
        for unit in self._units:  # the root stays gathered, with other parameter objects
            unit.reshard()

    @contextmanager
    def forward(self, *, reduces: bool) -> Iterator[None]:
        """Return a context for each forward of a step. All processes run the same number.

        Args:
            reduces: whether its backward is the last one of the step, which reduces the gradients.
        """
        self.root.set_requires_gradient_sync(reduces)
        with self._gathers.forward():
            yield

    def finish_backward(self) -> None:
        """Complete the gradients after the last backward of a step."""
        self._gathers.finish_backward()

    def unshard(self) -> None:
        """Gather all parameters on all processes. Gathered parameters stay gathered."""
        gather(self._units)

    def reshard(self) -> None:
        """Undo `unshard`, but keep changes of `requires_grad` that were made since."""
        for name, parameter in self._model.named_parameters():
            self._parts[name].requires_grad_(parameter.requires_grad)
        for unit in self._units:
            unit.reshard()
        _forget_forwards(self._units)

    def toggled(self) -> None:
        """Copy `requires_grad` from the parts to the parameters, while these are gathered."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._parts[name].requires_grad)

    def reduce(self) -> None:
        """Add the gradients of a backward to the parts, while the parameters are gathered."""
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
        """Return a context in which all blocks are gathered and no forward has a collective."""
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
    """Return the outputs, with a copy of each that is a view.

    An output is a view of an input if, for example, a block skips itself. FSDP attaches its
    backward to the outputs, and an in-place operation on a view would remove it.
    """
    if not torch.is_grad_enabled():
        return outputs
    return tree_map_only(torch.Tensor, _own, outputs)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor.clone()


def _forget_forwards(sharded: list[FSDPModule]) -> None:
    """Clear the list of forwards that backward follows to gather blocks ahead.

    Ranks have unequal numbers of evaluation batches, so they would gather different blocks.
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
    """Return the policy: gradients of 16-bit parameters are added in fp32, autocast does the rest.

    With `param_dtype`, FSDP would gather in 16 bits, at half the traffic. But then parameters that
    autocast keeps in fp32 would have 16 bits too. A norm on fp32 inputs would raise (on the CPU),
    and elsewhere the training would differ from that under `ddp`.
    """
    low = any(p.dtype in (torch.float16, torch.bfloat16) for p in unit.parameters())
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
