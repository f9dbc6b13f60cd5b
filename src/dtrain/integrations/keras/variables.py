"""Keras's variables under torch: which are buffers, what replicas have, where layers draw from.

Keras gives torch all variables of a model as parameters, also those that a forward changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def as_buffers(model: Any) -> None:
    """Make variables that are never trained into buffers, which they are for torch.

    As buffers they get what dtrain does for those: under `ddp` the first rank's at every step,
    under `exact` the mean over the virtual shards, and they are no part of what is reduced.
    """
    held = [each for each in model.modules() if isinstance(each, torch.nn.ParameterDict)]
    for name, variable in _changing(model).items():
        variable._value = variable.value.detach().clone()
        for parameters in held:
            if variable.path in parameters:
                parameters.pop(variable.path)
        model.register_buffer(name, variable._value)


def _buffers_of(model: Any) -> list[tuple[Any, torch.Tensor]]:
    """Pairs of such a variable and the tensor that the model, or a replica of it, has for it."""
    return [(variable, model._buffers[name]) for name, variable in _changing(model).items()]


def _changing(model: Any) -> dict[str, Any]:
    """By the name of its buffer; a layer that is frozen keeps its weights among the others."""
    own = [v for layer in model._flatten_layers() for v in layer._non_trainable_variables]
    return {v.path.replace(".", "_"): v for v in own if v.value.is_floating_point()}


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

    tensors, buffers = dict(_parameters(model)), _buffers_of(model)
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


class SeedGenerators:
    """Where a model's layers draw from: Keras's seed generators, one for each layer that draws.

    Each is a counter that Keras keeps among the model's variables, begun alike in every process:
    all ranks would draw the same dropout masks, and a rank that calls the model more often than
    another would no longer hold the same model. So for every call they are seeded from torch's
    generator, which dtrain keys by rank, or under `exact` by (seed, step, shard), and saves; after
    it they are as they were.
    """

    def __init__(self, model: Any) -> None:
        layers = model._flatten_layers()
        found = [each for layer in layers for each in getattr(layer, "_seed_generators", ())]
        self._own = list({id(each): each for each in found}.values())

    @contextlib.contextmanager
    def keyed(self) -> Iterator[None]:
        """A context for one call of the model."""
        from keras.src.random.seed_generator import global_seed_generator

        states = [each.state.value for each in (*self._own, global_seed_generator())]
        before = [state.clone() for state in states]
        drawn = torch.randint(2**31 - 1, (len(states), 1)).to(states[0])
        _put(states, [torch.cat((seed, torch.zeros_like(seed))) for seed in drawn])
        try:
            yield
        finally:
            _put(states, before)


def _put(states: list[Any], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for state, value in zip(states, values, strict=True):
            state.copy_(value)
