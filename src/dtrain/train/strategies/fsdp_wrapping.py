"""The parts of a model that FSDP gathers one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from dtrain.errors import DtrainError

_LISTS = (nn.ModuleList, nn.ModuleDict)
"""Modules that nobody calls."""


def units(model: nn.Module, wrap: Sequence[str] | None = None) -> list[nn.Module]:
    """Return the blocks of a model: the children of its outermost `ModuleList`s and `Sequential`s.

    A `ModuleList` inside them is opened, too. Any other child that has parameters is one block.
    Parameters outside all blocks (embeddings, a head) belong to the root. A block that shares a
    parameter with a module outside of it (tied weights) also belongs to the root.

    Args:
        model: the model.
        wrap: names of classes, `fsdp.wrap`. The blocks are the modules of these classes instead. A
            block inside another comes before it.
    """
    if wrap is None:
        found: dict[int, nn.Module] = {}
        _collect(model, found)
        blocks = list(found.values())
    else:
        blocks = of_classes(model, wrap, "fsdp.wrap")[::-1]
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    return [block for block in blocks if _shares_nothing(block, uses)]


def of_classes(model: nn.Module, names: Sequence[str], field: str) -> list[nn.Module]:
    """Return the modules inside a model that are of these classes and have parameters.

    Raises:
        DtrainError: no such module is of one of the classes. `field` is the field that names it.
    """
    inside = [
        each
        for each in model.modules()
        if each is not model and not isinstance(each, _LISTS)
        if next(each.parameters(), None) is not None
    ]
    kinds = {each: {kind.__name__ for kind in type(each).__mro__} for each in inside}
    missing = [name for name in names if not any(name in kind for kind in kinds.values())]
    if missing:
        known = dict.fromkeys(type(each).__name__ for each in inside)
        raise DtrainError(
            f"{field} names {missing[0]}, but no module with parameters inside the model is of "
            f"such a class; there are: {', '.join(known) or 'none'}",
            code="strategy.no-such-class",
        )
    return [each for each in inside if not kinds[each].isdisjoint(names)]


def outermost(model: nn.Module, blocks: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Yield the largest modules inside a model that contain no block; a block itself is one, too.

    Modules without parameters are left out. Lists and dicts of modules are opened: nobody calls
    them.
    """
    for child in model.children():
        if isinstance(child, _LISTS) or contains(child, blocks):
            yield from outermost(child, blocks)
        elif next(child.parameters(), None) is not None:
            yield child


def contains(module: nn.Module, blocks: Collection[nn.Module]) -> bool:
    return any(each in blocks for each in module.modules() if each is not module)


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


def check_shardable(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise if FSDP cannot cut a parameter. `blocks` are those of `units`."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise DtrainError(
                f"parameter {name} is a scalar, which strategy 'fsdp' cannot cut into parts; give "
                f"it one dimension, for example torch.tensor([{parameter.item():g}]), or use "
                "strategy 'ddp'",
                code="strategy.scalar-parameter",
            )
    left = dict.fromkeys(model.parameters())
    for block in [*blocks, model]:
        group = [parameter for parameter in block.parameters() if parameter in left]
        _check_types(group, model)
        for parameter in group:
            del left[parameter]


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
