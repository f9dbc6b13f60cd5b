"""The parameters that require a gradient now, and those that got one in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from dtrain.train.checks.collective_trace import CHAIN


class Trainable:
    """The parameters of a model that are trained now."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._all = list(model.parameters())
        self._flags: list[bool] = []

    def changed(self) -> bool:
        """Return whether other parameters are trained than at the last call; True at the first."""
        flags = [parameter.requires_grad for parameter in self._all]
        if flags == self._flags:
            return False
        self._flags = flags
        # ranks that freeze different parameters would wait for one another
        CHAIN.add(f"{sum(flags)} of {len(flags)} parameters require a gradient")
        return True

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters trained at the last call of `changed`, in the model's order."""
        return [each for each, flag in zip(self._all, self._flags, strict=True) if flag]


class Usage:
    """Records which parameters get a gradient, if the gradient itself does not show it.

    FSDP fills in zeros for parameters that a rank did not use, so that all ranks reduce the same
    tensors. An optimizer treats a gradient of zero differently from none: AdamW decays the weight.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._used: set[str] = set()

    def __len__(self) -> int:
        return len(self._parameters)

    def watch(self, model: torch.nn.Module) -> None:
        """Start to record. Call it once, while the model's parameters are whole."""
        for name, parameter in model.named_parameters():
            if name in self._parameters and parameter.is_floating_point():
                trained = parameter.requires_grad  # a frozen parameter may be trained later
                parameter.requires_grad_(True)
                parameter.register_post_accumulate_grad_hook(partial(self._note, name))
                parameter.requires_grad_(trained)

    def clear(self) -> None:
        self._used.clear()

    def flags(self) -> list[float]:
        """Return for each parameter 1 if this rank used it in this step, otherwise 0."""
        return [float(name in self._used) for name in self._parameters]

    def forget_unused(self, users: Sequence[float]) -> None:
        """Remove the gradient of parameters that no rank used."""
        if not any(users):
            return  # a loss depends on some parameter, so the record cannot be right
        for parameter, count in zip(self._parameters.values(), users, strict=True):
            if count == 0:
                parameter.grad = None

    def _note(self, name: str, parameter: torch.Tensor) -> None:
        self._used.add(name)
