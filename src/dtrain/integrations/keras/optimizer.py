"""A Keras optimizer as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class KerasOptimizer(torch.optim.Optimizer):
    """A torch optimizer that calls a Keras optimizer; Keras's slots are the parameters' state."""

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
        """Apply the gradients; the learning rate follows Keras's schedule."""
        with torch.no_grad():
            gradients = [variable.value.grad for variable in self._variables]
            self._keras.apply(gradients, self._variables)
            self.note()

    def averages(self) -> list[tuple[Any, Any]]:
        """Return each variable with its moving average; none without `use_ema`."""
        if not self._keras.use_ema:
            return []
        pairs = zip(self._variables, self._keras._model_variables_moving_average, strict=True)
        return [(variable, average) for variable, average in pairs if average is not None]

    def finalize(self) -> None:
        """Copy the averages into the variables, as `fit` does at its end."""
        self._keras.finalize_variable_values(self._variables)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the variables of Keras, which hold it."""
        for index, values in state_dict["state"].items():
            for name, value in values.items():
                self.state[self._variables[index].value][name].copy_(value)
        group = state_dict["param_groups"][0]
        for key, variable in self._shared().items():
            variable.assign(group[key])
        self.note()

    def _slots(self) -> dict[str, list[Any]]:
        """Return the slots: for each attribute, a list with one variable per trainable one."""
        return {
            name.lstrip("_"): list(value)
            for name, value in vars(self._keras).items()
            if isinstance(value, list)
            and name not in ("_trainable_variables", "_variables")
            and len(value) == len(self._variables)
            and any(hasattr(each, "assign") for each in value)
        }

    def _shared(self) -> dict[str, Any]:
        """Return the optimizer's other variables: its number of steps and its learning rate."""
        slots = {id(each) for slots in self._slots().values() for each in slots}
        shared = [each for each in self._keras.variables if id(each) not in slots]
        return {f"{each.name} ({index})": each for index, each in enumerate(shared)}

    def note(self) -> None:
        """Copy the current values of Keras's optimizer: a callback may have set its rate."""
        group = self.param_groups[0]
        group["lr"] = self._rate()
        group.update((key, each.value.tolist()) for key, each in self._shared().items())

    def _rate(self) -> float:
        return float(self._keras.learning_rate)
