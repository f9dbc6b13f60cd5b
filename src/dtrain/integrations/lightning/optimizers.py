"""What `configure_optimizers` of a module may return, and when its scheduler is stepped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dtrain.errors import UsageError

Wish = dict[str, Any]
"""A scheduler as Lightning's dict has it: `scheduler`, `interval`, `frequency`."""


class EveryFew:
    """A scheduler that is stepped after every so many steps: Lightning counts epochs too."""

    def __init__(self, wish: Wish, steps_between: Callable[[Wish], int | None]) -> None:
        self.scheduler = wish["scheduler"]
        self._wish, self._steps_between = wish, steps_between
        self._count = 0

    @property
    def last_epoch(self) -> Any:
        return self.scheduler.last_epoch

    def steps_in(self, steps: int | None) -> int | None:
        """How often the scheduler is stepped in so many steps; None where nobody knows yet."""
        between = self._steps_between(self._wish)
        return None if steps is None or between is None else steps // between

    def step(self) -> None:
        between = self._steps_between(self._wish)
        if between is None:
            raise UsageError(
                "a scheduler by epochs needs data of a known length; use interval step",
                code="lightning.scheduler-by-epochs",
            )
        self._count += 1
        if self._count % between == 0:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self._count = state["count"]


def as_wish(scheduler: Any) -> Wish:
    return scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}


def by_steps(scheduler: Any) -> bool:
    """Whether a scheduler, or a dict with one, counts optimizer steps, and not epochs."""
    return bool(as_wish(scheduler).get("interval", "epoch") == "step")


def follows_metric(scheduler: Any) -> bool:
    """Whether a scheduler, or a dict with one, is stepped with the value of a metric."""
    wish = as_wish(scheduler)
    plateau = isinstance(wish["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    return plateau or bool(wish.get("reduce_on_plateau"))


def configured(given: Any) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers, of the many things that `configure_optimizers` may return."""
    if isinstance(given, torch.optim.Optimizer):
        return [given], []
    if isinstance(given, dict):
        scheduler = given.get("lr_scheduler")
        return [given["optimizer"]], [scheduler] if scheduler else []
    if given is None:
        return [], []
    if not isinstance(given, list | tuple):
        raise UsageError(
            f"configure_optimizers() returned {type(given).__name__}; return an optimizer, or "
            "another value that Lightning accepts",
            code="lightning.bad-optimizers",
        )
    if len(given) == 2 and isinstance(given[0], list | tuple):
        schedulers = [given[1]] if isinstance(given[1], dict) else list(given[1])
        return list(given[0]), schedulers
    pairs = [configured(each) for each in given]
    return [o for optimizers, _ in pairs for o in optimizers], [s for _, ss in pairs for s in ss]
