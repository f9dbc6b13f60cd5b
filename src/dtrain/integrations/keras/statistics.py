"""What a forward changes of a model: BatchNormalization's moving averages and the like."""

from __future__ import annotations

from typing import Any

import torch


def as_buffers(model: Any) -> None:
    """Make variables that are never trained into buffers, which they are for torch.

    Keras gives torch all variables as parameters, those too that a forward changes. As buffers
    they get what dtrain does for those: under `ddp` the first rank's at every step, under `exact`
    the mean over the virtual shards, and they are no part of what is reduced.
    """
    held = [each for each in model.modules() if isinstance(each, torch.nn.ParameterDict)]
    for name, variable in _changing(model).items():
        variable._value = variable.value.detach().clone()
        for parameters in held:
            if variable.path in parameters:
                parameters.pop(variable.path)
        model.register_buffer(name, variable._value)


def buffers_of(model: Any) -> list[tuple[Any, torch.Tensor]]:
    """Pairs of such a variable and the tensor that the model, or a replica of it, has for it."""
    return [(variable, model._buffers[name]) for name, variable in _changing(model).items()]


def _changing(model: Any) -> dict[str, Any]:
    """By the name of its buffer; a layer that is frozen keeps its weights among the others."""
    own = [v for layer in model._flatten_layers() for v in layer._non_trainable_variables]
    return {v.path.replace(".", "_"): v for v in own if v.value.is_floating_point()}
