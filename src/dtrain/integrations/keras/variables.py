"""Keras's variables under torch: buffers, the values of replicas, and random seeds.

Keras gives torch all variables of a model as parameters, also those that a forward changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


def as_buffers(model: Any) -> None:
    """Turn variables that are never trained into buffers, which is what torch calls them.

    dtrain then treats them as buffers. Under `ddp` they are those of the first rank at every step,
    under `exact` the mean over the virtual shards. They have no part in the gradient reduction.
    """
    dicts = [each for each in model.modules() if isinstance(each, torch.nn.ParameterDict)]
    for name, variable in _untrained(model).items():
        variable._value = variable.value.detach().clone()
        for parameters in dicts:
            if variable.path in parameters:
                parameters.pop(variable.path)
        model.register_buffer(name, variable._value)


def with_plain_replicas(model: Any) -> None:
    """Let replicas of the model have the same attributes as the model.

    torch assigns the attributes of a replica, and Keras wraps each dict and list that is assigned
    to a layer. A model with a dict of outputs would then return another kind of dict.
    """
    for module in model.modules():
        vars(module)["_replicate_for_data_parallel"] = functools.partial(_plain_replica, module)


def _plain_replica(module: torch.nn.Module) -> torch.nn.Module:
    """Do what torch's method does, without Keras's `__setattr__`."""
    replica = module.__new__(type(module))
    copied = {"_buffers": module._buffers.copy(), "_modules": module._modules.copy()}
    attributes = {**vars(module), **copied, "_parameters": {}, "_is_replica": True}
    object.__setattr__(replica, "__dict__", attributes)
    return replica


def _buffers_of(model: Any) -> list[tuple[Any, torch.Tensor]]:
    """Return pairs of such a variable and its tensor in the model, or in a replica of it."""
    return [(variable, model._buffers[name]) for name, variable in _untrained(model).items()]


def _untrained(model: Any) -> dict[str, Any]:
    """Return the variables that are never trained, by the name of their buffer.

    The weights of a frozen layer are not among them.
    """
    own = [v for layer in model._flatten_layers() for v in layer._non_trainable_variables]
    return {v.path.replace(".", "_"): v for v in own if v.value.is_floating_point()}


@contextlib.contextmanager
def replicated(model: Any) -> Iterator[None]:
    """Give the model's variables the values of this replica while the context lasts.

    Keras's layers read their variables, which all replicas share, and not the parameters that
    were copied. Within a stateless scope, which belongs to one thread, a variable has the value
    that the scope gives it. For the model itself, this does nothing.
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
    """Yield each variable's path and the replica's tensor, from Keras's one ParameterDict."""
    for module in model.modules():
        if isinstance(module, torch.nn.ParameterDict):
            for path, tensor in module._former_parameters.items():
                if tensor.is_floating_point():  # the others are seeds, which are keyed
                    yield path, tensor


class SeedGenerators:
    """Keras's seed generators of a model, one for each layer that draws random numbers.

    Each is a counter among the model's variables and starts with the same value in every process.
    So all ranks would draw the same dropout masks. A rank that calls the model more often than
    another would no longer hold the same model.

    Therefore every call seeds them from torch's generator, and restores their values at its end.
    dtrain saves that generator, and keys it by rank, or under `exact` by (seed, step, shard).
    """

    def __init__(self, model: Any) -> None:
        layers = model._flatten_layers()
        found = [each for layer in layers for each in getattr(layer, "_seed_generators", ())]
        self._own = list({id(each): each for each in found}.values())

    @contextlib.contextmanager
    def keyed(self) -> Iterator[None]:
        """Seed the generators for one call of the model."""
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
