"""The parts of a model that FSDP gathers one at a time."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from dtrain.errors import DtrainError


def units(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the children of its outermost `ModuleList`s and `Sequential`s.

    A `ModuleList` inside them is opened, too. Any other child that has parameters is one block.
    Parameters outside all blocks (embeddings, a head) belong to the root. A block that shares a
    parameter with a module outside of it (tied weights) also belongs to the root.
    """
    found: dict[int, nn.Module] = {}
    _collect(model, found)
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    return [block for block in found.values() if _shares_nothing(block, uses)]


def _collect(module: nn.Module, found: dict[int, nn.Module]) -> None:
    holds_blocks = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if not holds_blocks or isinstance(child, nn.ModuleList | nn.ModuleDict):
            _collect(child, found)
        elif next(child.parameters(), None) is not None:
            found[id(child)] = child


def _shares_nothing(block: nn.Module, uses: Counter[int]) -> bool:
    inside: Counter[int] = Counter()
    for module in block.modules():
        inside.update(id(parameter) for parameter in module._parameters.values())
    return all(uses[key] == count for key, count in inside.items())


def check_shardable(model: nn.Module) -> None:
    """Raise if FSDP cannot cut a parameter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise DtrainError(
                f"parameter {name} is a scalar, which strategy 'fsdp' cannot cut into parts; give "
                f"it one dimension, for example torch.tensor([{parameter.item():g}]), or use "
                "strategy 'ddp'",
                code="strategy.scalar-parameter",
            )
    blocks = units(model)
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in in_blocks]
    for parameters in ([list(block.parameters()) for block in blocks], [rest]):
        for group in parameters:
            _check_types(group, model)


def _check_types(parameters: list[nn.Parameter], model: nn.Module) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds: dict[torch.dtype, str] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            kinds.setdefault(parameter.dtype, names[parameter])
    if len(kinds) > 1:
        listed = ", ".join(f"{name} is {str(dtype)[6:]}" for dtype, name in kinds.items())
        raise DtrainError(
            "strategy 'fsdp' needs parameters of one dtype in each block of the model, but "
            f"{listed}; use one dtype, or strategy 'ddp'",
            code="strategy.mixed-types",
        )
