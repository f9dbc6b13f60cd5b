"""A Keras optimizer as one of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class KerasOptimizer(torch.optim.Optimizer):
    """A Keras optimizer that steps as torch's do; its slots are the state of each parameter."""

    def __init__(self, model: Any) -> None:
        self._keras = model.optimizer
        self._variables = list(model.trainable_variables)
        self._keras.build(self._variables)
        super().__init__([variable.value for variable in self._variables], {"lr": self._rate()})
        for name, slots in self._slots().items():
            for variable, slot in zip(self._variables, slots, strict=True):
                if slot is not None:
                    self.state[variable.value][name] = slot.value
        self.note()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply the gradients; the learning rate follows its schedule."""
        with torch.no_grad():
            gradients = [variable.value.grad for variable in self._variables]
            self._keras.apply(gradients, self._variables)
            self.note()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the variables of Keras, where it lives."""
        for index, values in state_dict["state"].items():
            for name, value in values.items():
                self.state[self._variables[index].value][name].copy_(value)
        group = state_dict["param_groups"][0]
        for key, variable in self._shared().items():
            variable.assign(group[key])
        self.note()

    def _slots(self) -> dict[str, list[Any]]:
        """Attribute → one variable for each trainable one; Keras keeps slots in such lists."""
        return {
            name.lstrip("_"): list(value)
            for name, value in vars(self._keras).items()
            if isinstance(value, list)
            and name not in ("_trainable_variables", "_variables")
            and len(value) == len(self._variables)
            and any(hasattr(each, "assign") for each in value)
        }

    def _shared(self) -> dict[str, Any]:
        """The optimizer's other variables by option: how often it stepped, its learning rate."""
        slots = {id(each) for slots in self._slots().values() for each in slots}
        shared = [each for each in self._keras.variables if id(each) not in slots]
        return {f"{each.name} ({index})": each for index, each in enumerate(shared)}

    def note(self) -> None:
        """Take over what Keras's optimizer has now: a callback may have set its rate."""
        group = self.param_groups[0]
        group["lr"] = self._rate()
        group.update((key, each.value.tolist()) for key, each in self._shared().items())

    def _rate(self) -> float:
        return float(self._keras.learning_rate)
