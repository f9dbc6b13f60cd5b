"""Random numbers of Keras's layers, keyed as those of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Draws:
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

    @contextmanager
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
