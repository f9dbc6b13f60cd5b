"""A model that `fully_shard` cuts into one part per process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils._pytree import tree_map_only

from dtrain import catalog
from dtrain.errors import UsageError
from dtrain.job.spec import FsdpSpec
from dtrain.train.strategies.base import refuse_sparse
from dtrain.train.strategies.fsdp_gathers import Gathers, gather
from dtrain.train.strategies.fsdp_wrapping import check_shardable, outermost, units
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
        options: section `fsdp` of the job.
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
        options: FsdpSpec,
        *,
        divide_by: float = 1.0,
        manual: bool = False,
    ) -> None:
        refuse_sparse(model, "fsdp")
        blocks = units(model, options.wrap)
        check_shardable(model, blocks)
        mesh = _mesh(device, world_size, options.replicas)
        self.shard_group = mesh.get_group("shard")
        """The processes that hold the parts of one copy of the model."""
        self.root: Any = _Root(step)
        """The step as a module, which the caller runs inside `forward`."""
        if options.param_dtype is not None:
            _cast(model, blocks, _DTYPES[options.param_dtype])
        self._units: list[FSDPModule] = []
        """Every block, then the root."""
        for unit in [*blocks, self.root]:
            unit.register_forward_hook(_own_outputs)
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=_policy(unit, options, casts_inputs=unit is not self.root),
                reshard_after_forward=options.reshard_after_forward,
                offload_policy=CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy(),
            )
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(divide_by)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
            self._units.append(unit)
        self._gathers = Gathers(model, blocks, self.root, reshards=options.reshard_after_forward)
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
        self._gathers.reduce(self._units)
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


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _mesh(device: torch.device, world_size: int, replicas: int) -> DeviceMesh:
    """Return the processes as copies of the model by parts of a copy."""
    problem = catalog.replicas_problem("fsdp", replicas, [world_size])
    if problem:
        raise UsageError(problem, code="plan.uneven-replicas")
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicas, world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _policy(
    unit: torch.nn.Module, options: FsdpSpec, *, casts_inputs: bool
) -> MixedPrecisionPolicy:
    """Return the policy. Gradients that have 16 bits are added in fp32, unless the job says else.

    The root is not a module of the model but the whole step: its inputs are the batch, with targets
    and weights, which nothing may round.
    """
    given = options.param_dtype and _DTYPES[options.param_dtype]
    kinds = {given or parameter.dtype for parameter in unit.parameters()}
    low = not kinds.isdisjoint((torch.float16, torch.bfloat16))
    reduced = torch.float32 if low else None
    if options.reduce_dtype is not None:
        reduced = _DTYPES[options.reduce_dtype]
    return MixedPrecisionPolicy(
        param_dtype=given, reduce_dtype=reduced, cast_forward_inputs=casts_inputs
    )


def _cast(model: torch.nn.Module, blocks: list[torch.nn.Module], dtype: torch.dtype) -> None:
    """Give each module outside the blocks its inputs in a type, and let the model return fp32.

    FSDP does so for the blocks. Modules are cast one by one, because the step may call any method
    of the model.
    """

    def cast(tensor: torch.Tensor, to: torch.dtype = dtype) -> torch.Tensor:
        return tensor.to(to) if tensor.is_floating_point() else tensor

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, cast, (args, kwargs))

    def after(_module: Any, _args: Any, outputs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda each: cast(each, torch.float32), outputs)

    for module in outermost(model, blocks):
        if module not in blocks:
            module.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
