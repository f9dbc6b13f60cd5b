"""The callbacks of a job that watch a metric.

Metrics are reduced over all ranks, so all ranks decide the same.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.callback import Callback, Session
from dtrain.errors import CheckpointError, UsageError
from dtrain.job.spec import BestSpec, EarlyStoppingSpec


def no_such_metric(field: str, name: str, metrics: Iterable[str]) -> UsageError:
    """Return the error for a job that watches a metric which the evaluation did not return."""
    near = difflib.get_close_matches(name, metrics, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    found = ", ".join(metrics) or "nothing"
    return UsageError(
        f"{field} is {name!r}, but the evaluation returned: {found}{meant}",
        code="eval.no-such-metric",
    )


class EarlyStopping(Callback):
    """Ends training when a metric no longer improves."""

    def __init__(self, spec: EarlyStoppingSpec) -> None:
        self._spec = spec
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0
        """The number of evaluations since the best one."""

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        self.update(metrics, session.step)
        if self.exhausted:
            session.stop(str(self))

    def update(self, metrics: Mapping[str, float], step: int) -> None:
        name = self._spec.metric
        if name not in metrics:
            raise no_such_metric("train.early_stopping.metric", name, metrics)
        if self._is_better(metrics[name]):
            self.best, self.best_step, self.waited = metrics[name], step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        return self.waited >= self._spec.patience

    def __str__(self) -> str:
        return (
            f"{self._spec.metric} has not improved in {self.waited} evaluations; "
            f"best {self.best} after step {self.best_step}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "of": [self._spec.metric, self._spec.mode],
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, unless it belongs to another metric or mode."""
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


@dataclass(frozen=True)
class Keep:
    """A request to keep the checkpoint of a step when newer ones follow."""

    as_best: bool = True
    """Whether it becomes `checkpoints/best`."""
    score: tuple[str, float] | None = None
    """The metric that the request depends on, and its value."""


class KeepBest(Callback):
    """Keeps the checkpoints with the best values of a metric.

    Args:
        spec: the metric, and how many are kept.
        keep: keeps the checkpoint of the current step. All ranks call it.
    """

    def __init__(self, spec: BestSpec, keep: Callable[[Keep], None]) -> None:
        self._spec = spec
        self._keep = keep
        self._best: list[float] = []
        """The values of the checkpoints that are kept, the best first."""

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        name = self._spec.metric
        if name not in metrics:
            raise no_such_metric("checkpoint.best.metric", name, metrics)
        sign = -1 if self._spec.mode == "max" else 1
        value = metrics[name]
        better_or_equal = sum(sign * other <= sign * value for other in self._best)
        if math.isnan(value) or better_or_equal >= self._spec.keep:
            return
        self._best.insert(better_or_equal, value)
        del self._best[self._spec.keep :]
        self._keep(Keep(as_best=better_or_equal == 0, score=(name, value)))

    def state_dict(self) -> dict[str, Any]:
        return {"of": [self._spec.metric, self._spec.mode], "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "best" not in state:
            raise CheckpointError("it holds no best value", code="checkpoint.state-missing")
        if state["of"] == [self._spec.metric, self._spec.mode]:
            self._best = state["best"][: self._spec.keep]
