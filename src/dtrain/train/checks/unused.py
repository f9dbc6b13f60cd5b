"""Parameters without a gradient, by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from dtrain.train.metrics.events import Events

logger = logging.getLogger(__name__)

_MAX_SHOWN = 8


class Unused:
    """Tells which parameters the first step, and a whole epoch, left without a gradient.

    Costs nothing once every parameter has had one.

    Args:
        parameters: of the model, by name.
        events: of the run.
        active: whether this process is the one that speaks.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], events: Events, *, active: bool
    ) -> None:
        self._waiting = {name: each for name, each in parameters.items() if each.requires_grad}
        self._events = events
        self._active = active
        self._first = True

    def step(self, step: int, *, ends_epoch: bool) -> None:
        """After a step's backward, while its gradients are there."""
        if not self._waiting or not self._active:
            return
        self._waiting = {n: p for n, p in self._waiting.items() if p.grad is None}
        names = list(self._waiting)
        if names and self._first:
            self._tell(step, names, "step", "no sample of this step used them")
        if names and ends_epoch:
            self._tell(
                step, names, "epoch", "no sample has used them so far; they stay as they are"
            )
            self._waiting = {}
        self._first = False

    def _tell(self, step: int, names: list[str], over: str, meaning: str) -> None:
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        shown = ", ".join(names[:_MAX_SHOWN]) + more
        logger.warning("parameters without a gradient after step %d: %s (%s)", step, shown, meaning)
        self._events.write("unused_parameters", step=step, over=over, parameters=names)
