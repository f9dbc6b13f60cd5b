"""The state of a training that is compared between ranks, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dtrain.train.checkpoint.state import plain_name, plain_parameters

Named = dict[str, torch.Tensor]

NUMBERS = "learning rate and counters"
COLLECTIVES = "collectives"
GRADIENTS = "gradients"
PARAMETERS = "parameters"
MOMENTS = "optimizer state"
BUFFERS = "buffers"
KEPT = "task state"


@dataclass
class TrainState:
    """A model and the objects that train it.

    Names are the model's. The tensors are looked up each time, because gradients and optimizer
    state are created and freed during the training.
    """

    model: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer] = ()
    schedulers: Sequence[Any] = ()
    scaler: torch.amp.GradScaler | None = None
    numbers: Callable[[], Mapping[str, Any]] = field(default=dict)
    """Returns other numbers that must be the same on all ranks, for example the data position."""
    kept: Callable[[], Mapping[str, Any]] = field(default=dict)
    """Returns the tensors and plain values that the task keeps, by name."""
    hear_updates: Callable[[Callable[[], None]], None] | None = None
    """Registers a function to call before each update. None means before each optimizer's
    `step`."""

    def tensors(self, kind: str) -> Named:
        find: dict[str, Callable[[], Named]] = {
            PARAMETERS: self.parameters,
            GRADIENTS: self._gradients,
            MOMENTS: self._moments,
            BUFFERS: self._buffers,
        }
        return find[kind]()

    def __post_init__(self) -> None:
        self._parameters = plain_parameters(self.model)

    def before_updates(self, call: Callable[[], None]) -> None:
        """Register a function that is called before gradients are used."""
        if self.hear_updates is not None:
            self.hear_updates(call)
            return
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda *_: call())

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._parameters

    def is_cut(self) -> bool:
        """Return whether the parameters are sharded."""
        return any(hasattr(each, "to_local") for each in self.model.parameters())

    def counters(self) -> dict[str, Any]:
        """Return every number that must be the same on all ranks."""
        counters: dict[str, Any] = {}
        for number, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                rate = f"lr of group {index}" if index else "lr"
                counters[_numbered(rate, number)] = float(group["lr"])
        for number, scheduler in enumerate(self.schedulers):
            counters[_numbered("scheduler step", number)] = getattr(scheduler, "last_epoch", None)
        if self.scaler is not None:
            counters["loss scale"] = self.scaler.get_scale()
        return {**counters, **self.numbers()}

    def _gradients(self) -> Named:
        return {
            name: each.grad for name, each in self.parameters().items() if each.grad is not None
        }

    def _moments(self) -> Named:
        return {
            _numbered(f"{name}.{key}", number): value
            for number, optimizer in enumerate(self.optimizers)
            for name, each in self.parameters().items()
            if each in optimizer.state
            for key, value in optimizer.state[each].items()
            if isinstance(value, torch.Tensor)
        }

    def _buffers(self) -> Named:
        return {plain_name(name): each for name, each in self.model.named_buffers()}


def _numbered(name: str, number: int) -> str:
    """Return a name with the number of the optimizer or scheduler; without it for the first."""
    return f"{name} ({number})" if number else name
