"""What of a training is compared between ranks, by name."""

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
    """A model and what trains it.

    Names are the model's; the tensors are looked up anew each time, since gradients and
    optimizer state come and go.
    """

    model: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer] = ()
    schedulers: Sequence[Any] = ()
    scaler: torch.amp.GradScaler | None = None
    numbers: Callable[[], Mapping[str, Any]] = field(default=dict)
    """Further numbers that are the same on all ranks, as the position in the data."""
    kept: Callable[[], Mapping[str, Any]] = field(default=dict)
    """Tensors and plain values that the task keeps, by name."""
    hear_updates: Callable[[Callable[[], None]], None] | None = None
    """Takes what is to be called before each update; None: before each optimizer's `step`."""

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
        """Have something called whenever gradients are about to be used."""
        if self.hear_updates is not None:
            self.hear_updates(call)
            return
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda *_: call())

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._parameters

    def is_cut(self) -> bool:
        """Whether ranks hold parts of the parameters."""
        return any(hasattr(each, "to_local") for each in self.model.parameters())

    def counters(self) -> dict[str, Any]:
        """Every number that all ranks should have alike."""
        counters: dict[str, Any] = {}
        for number, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                place = f"lr of group {index}" if index else "lr"
                counters[_of(place, number)] = float(group["lr"])
        for number, scheduler in enumerate(self.schedulers):
            counters[_of("scheduler step", number)] = getattr(scheduler, "last_epoch", None)
        if self.scaler is not None:
            counters["loss scale"] = self.scaler.get_scale()
        return {**counters, **self.numbers()}

    def _gradients(self) -> Named:
        return {
            name: each.grad for name, each in self.parameters().items() if each.grad is not None
        }

    def _moments(self) -> Named:
        return {
            _of(f"{name}.{key}", number): value
            for number, optimizer in enumerate(self.optimizers)
            for name, each in self.parameters().items()
            if each in optimizer.state
            for key, value in optimizer.state[each].items()
            if isinstance(value, torch.Tensor)
        }

    def _buffers(self) -> Named:
        return {plain_name(name): each for name, each in self.model.named_buffers()}


def _of(name: str, number: int) -> str:
    """A name that says of which optimizer, or scheduler, where it is not the first."""
    return f"{name} ({number})" if number else name
