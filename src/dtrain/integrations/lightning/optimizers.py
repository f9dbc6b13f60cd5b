"""The values that `configure_optimizers` may return, and schedulers that step by an interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dtrain.errors import UsageError

SchedulerConfig = dict[str, Any]
"""Lightning's dict about a scheduler: `scheduler`, `interval`, `frequency`."""


class IntervalScheduler:
    """A scheduler that is stepped once per interval of several steps, or of epochs."""

    def __init__(
        self, config: SchedulerConfig, steps_between: Callable[[SchedulerConfig], int | None]
    ) -> None:
        self.scheduler = config["scheduler"]
        self._config, self._steps_between = config, steps_between
        self._count = 0

    @property
    def last_epoch(self) -> Any:
        return self.scheduler.last_epoch

    def steps_in(self, steps: int | None) -> int | None:
        """Return how often the scheduler is stepped in this number of steps; None if unknown."""
        between = self._steps_between(self._config)
        return None if steps is None or between is None else steps // between

    def step(self) -> None:
        between = self._steps_between(self._config)
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


def as_config(scheduler: Any) -> SchedulerConfig:
    return scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}


def by_steps(scheduler: Any) -> bool:
    """Return whether a scheduler, or a dict with one, counts optimizer steps, and not epochs."""
    return bool(as_config(scheduler).get("interval", "epoch") == "step")


def follows_metric(scheduler: Any) -> bool:
    """Return whether a scheduler, or a dict with one, is stepped with the value of a metric."""
    config = as_config(scheduler)
    plateau = isinstance(config["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
    return plateau or bool(config.get("reduce_on_plateau"))


def configured(given: Any) -> tuple[list[Any], list[Any]]:
    """Return the optimizers and schedulers in any value that `configure_optimizers` may return."""
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
