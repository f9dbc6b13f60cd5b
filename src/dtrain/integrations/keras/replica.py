"""A replica of `nn.DataParallel`, whose tensors Keras's variables do not know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dtrain.integrations.keras.statistics import buffers_of


@contextlib.contextmanager
def replicated(model: Any) -> Iterator[None]:
    """A context in which the model's variables have the values of this replica.

    Keras's layers read their variables, which are one for all replicas, and not the parameters
    that were copied. Within a stateless scope, which each thread has for itself, a variable's
    value is what the scope says. Nothing for the model itself.
    """
    if not getattr(model, "_is_replica", False):
        yield
        return
    import keras

    tensors, buffers = dict(_parameters(model)), buffers_of(model)
    weights = [(v, tensors[v.path]) for v in model.variables if v.path in tensors]
    first = weights[0][1]
    on_device = contextlib.nullcontext()
    if first.device.type == "cuda":
        on_device = keras.device(f"gpu:{first.device.index}")
    with on_device, keras.StatelessScope(state_mapping=[*weights, *buffers]) as scope:
        yield
    with torch.no_grad():
        for variable, tensor in buffers:
            tensor.copy_(scope.get_current_value(variable))


def _parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Path of a variable → the replica's tensor: Keras keeps all of them in one ParameterDict."""
    for module in model.modules():
        if isinstance(module, torch.nn.ParameterDict):
            for path, tensor in module._former_parameters.items():
                if tensor.is_floating_point():  # the others are seeds, which are keyed
                    yield path, tensor
