"""When a metric no longer improves. Decided from reduced metrics, so alike on every rank."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from dtrain.errors import UsageError
from dtrain.job.spec import EarlyStoppingSpec


def no_such_metric(field: str, name: str, metrics: Iterable[str]) -> UsageError:
    """What to say where a job watches a metric that an evaluation does not bring."""
    near = difflib.get_close_matches(name, metrics, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    found = ", ".join(metrics) or "nothing"
    return UsageError(f"{field} is {name!r}, but the evaluation brought: {found}{meant}")


class EarlyStopping:
    """Counts evaluations without improvement."""

    def __init__(self, spec: EarlyStoppingSpec) -> None:
        self._spec = spec
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0
        """Evaluations since the best one."""

    def update(self, metrics: dict[str, float], step: int) -> None:
        """Take in one evaluation.

        Raises:
            UsageError: it has no metric of the name that the job watches.
        """
        name = self._spec.metric
        if name not in metrics:
            raise no_such_metric("train.early_stopping.metric", name, metrics)
        if self._is_better(metrics[name]):
            self.best, self.best_step, self.waited = metrics[name], step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.waited >= self._spec.patience

    def __str__(self) -> str:
        return (
            f"{self._spec.metric} has not improved in {self.waited} evaluations; "
            f"best {self.best} after step {self.best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, and of what."""
        return {
            "of": [self._spec.metric, self._spec.mode],
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; a best value of something else is none."""
        if state["of"] != [self._spec.metric, self._spec.mode]:
            return
        self.best, self.best_step = state["best"], state["best_step"]
        self.waited = state["waited"]

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self._spec.mode == "min" else value - self.best
        return gain > self._spec.min_delta
