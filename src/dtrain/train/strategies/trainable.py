"""Which parameters require a gradient, which callbacks may change between two steps."""

from __future__ import annotations

import torch

from dtrain.train.checks.collective_trace import CHAIN


class Trainable:
    """The parameters of a model that are trained now.

    Args:
        model: whose parameters stay the same; frozen or not.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._all = list(model.parameters())
        self._flags: list[bool] = []

    def changed(self) -> bool:
        """Whether others are trained than at the last call; true at the first."""
        flags = [parameter.requires_grad for parameter in self._all]
        if flags == self._flags:
            return False
        self._flags = flags
        # ranks that do not freeze alike will wait for one another
        CHAIN.add(f"{sum(flags)} of {len(flags)} parameters require a gradient")
        return True

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the last call of `changed`, in the model's order."""
        return [each for each, flag in zip(self._all, self._flags, strict=True) if flag]
