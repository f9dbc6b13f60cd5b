"""Model and optimizer state by parameter name, so that it fits with any order and any wrapper.

An optimizer's own state is positional: if two layers of the same shape are swapped in the model,
Adam's moments are swapped without an error.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist

from dtrain.errors import CheckpointError
from dtrain.train.checkpoint.parts import StoredTensor, is_part, whole
from dtrain.words import few


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def plain_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the model's parameters by plain name, in the order of the model."""
    return {plain_name(name): each for name, each in model.named_parameters()}


def is_sharded(model: torch.nn.Module) -> bool:
    return any(is_part(parameter) for parameter in model.parameters())


def model_state(model: torch.nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """Return the model's state by plain name, with the model's own memory.

    Args:
        model: the model.
        keep_vars: whether to return the parameters themselves, as `state_dict` of torch does. To
            detach one that is sharded takes 0.1 ms.
    """
    state = model.state_dict(keep_vars=keep_vars)
    return {plain_name(name): value for name, value in state.items()}


def load_model_state(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load the state that `model_state` returned; its tensors may be `StoredTensor`.

    Stored tensors are read straight into the model's own, so that no rank holds them twice.

    Raises:
        CheckpointError: names or shapes differ, then nothing was changed; or a file is damaged.
    """
    current = model.state_dict()
    actual = {plain_name(name): name for name in current}
    problems = [f"{name} is not in the checkpoint" for name in actual if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in actual]
    for name, value in state.items():
        mine = current.get(actual.get(name, ""))
        if isinstance(mine, torch.Tensor) and mine.shape != value.shape:
            problems.append(f"{name} is {tuple(value.shape)}, in the model {tuple(mine.shape)}")
    if problems:
        raise CheckpointError(
            f"it does not fit the model: {few(problems, sep='; ')}", code="checkpoint.other-model"
        )
    for name, value in state.items():
        mine = current[actual[name]]
        if isinstance(value, StoredTensor) and isinstance(mine, torch.Tensor):
            value.read_into(mine)
        else:
            current[actual[name]] = as_cut(whole(value), mine)
    # most tensors are copied to themselves; but modules have hooks for this, or return copies
    model.load_state_dict(current)


def optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the optimizer's state, by plain parameter name instead of position.

    Args:
        model: the model that names the parameters.
        optimizer: an optimizer of its parameters.
        state: the optimizer's `state_dict()`, if the caller has it. The tensors are not copied.

    Raises:
        CheckpointError: the optimizer holds parameters that are not the model's.
    """
    groups = _group_names(model, optimizer)
    names = [name for group in groups for name in group]
    state = optimizer.state_dict() if state is None else state
    return {
        "state": {names[index]: dict(values) for index, values in state["state"].items()},
        "groups": [
            {**options, "params": group}
            for options, group in zip(state["param_groups"], groups, strict=True)
        ],
    }


def load_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    """Load the state that `optimizer_state` returned; parameters and groups may be reordered.

    Groups that were added during the training are added again.

    Raises:
        CheckpointError: the parameters are grouped differently.
    """
    saved = {**saved, "groups": whole(saved["groups"])}
    _add_groups(model, optimizer, saved)
    groups = _group_names(model, optimizer)
    options_of = {frozenset(group["params"]): group for group in saved["groups"]}
    names = [name for group in groups for name in group]
    position = {name: index for index, name in enumerate(names)}
    new_groups = []
    for group in groups:
        options = options_of.get(frozenset(group))
        if options is None:
            raise CheckpointError(
                f"it does not fit the optimizer: no group of it holds exactly {few(group)}",
                code="checkpoint.other-groups",
            )
        new_groups.append({**options, "params": [position[name] for name in group]})
    parameters = plain_parameters(model)
    state = {
        position[name]: {key: as_cut(value, parameters[name]) for key, value in values.items()}
        for name, values in saved["state"].items()
        if name in position
    }
    optimizer.load_state_dict({"state": state, "param_groups": new_groups})


def _add_groups(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    """Add the saved groups of which this optimizer has no parameter."""
    parameters = plain_parameters(model)
    known = {name for group in _group_names(model, optimizer) for name in group}
    for group in saved["groups"]:
        names = group["params"]
        if not names or not known.isdisjoint(names) or not parameters.keys() >= set(names):
            continue
        added = [parameters[name].requires_grad_(True) for name in names]
        optimizer.add_param_group({**group, "params": added})


def parameters_sha256(model: torch.nn.Module) -> str:
    """Return a SHA-256 of the names, types, shapes and bytes of all parameters, sorted by name.

    It does not depend on sharding. If the parameters are sharded, all ranks must call it together.
    """
    digest = hashlib.sha256()
    parameters = plain_parameters(model)
    for name in sorted(parameters):
        tensor = _full(parameters[name].detach()).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def gathered(value: Any) -> Any:
    """Return a sharded tensor as a full one on rank 0, and None elsewhere; others unchanged."""
    if not is_part(value):
        return value
    full = _full(value.detach())
    return full.cpu() if dist.get_rank() == 0 else None


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor as a full one, and any other unchanged."""
    full: torch.Tensor = tensor.full_tensor() if is_part(tensor) else tensor
    return full


def as_cut(value: Any, like: Any) -> Any:
    """Return a value as a tensor like another: read if stored, sharded if `like` is.

    A value of another shape is not sharded.
    """
    if isinstance(value, StoredTensor):
        return value.read_like(like)
    if not is_part(like) or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mine = value.to(like.device)
    return distribute_tensor(mine, like.device_mesh, like.placements, src_data_rank=None)


def _group_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(value): name for name, value in plain_parameters(model).items()}
    groups = []
    for group in optimizer.param_groups:
        foreign = [value for value in group["params"] if id(value) not in names]
        if foreign:
            raise CheckpointError(
                f"the optimizer holds {len(foreign)} parameters that are not in the model (the "
                f"first has shape {tuple(foreign[0].shape)}), so their state has no name; make "
                "them parameters of the model",
                code="task.optimizer-foreign-parameters",
            )
        groups.append([names[id(value)] for value in group["params"]])
    return groups
