"""The callbacks of one training: the user's callbacks, and those that the job asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dtrain.callback import Callback
from dtrain.errors import DtrainError, UsageError
from dtrain.train import collectives
from dtrain.train.checkpoint.leaves import refuse_unreadable, restoring
from dtrain.train.context import TrainContext
from dtrain.train.loop.metric_callbacks import EarlyStopping, Keep, KeepBest
from dtrain.train.loop.progress import Progress

logger = logging.getLogger(__name__)


def listed(callbacks: Any) -> list[Any]:
    """Return the result of `Task.callbacks` as a list."""
    if not isinstance(callbacks, Iterable | None):
        raise DtrainError(
            f"callbacks() returned a {type(callbacks).__name__}, not a list of them",
            code="task.bad-callbacks",
        )
    return list(callbacks or ())


class View:
    def __init__(
        self,
        context: TrainContext,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        log: Callable[[str, float], None],
        keep: Callable[[Keep], None],
    ) -> None:
        self.rank = context.ranks.rank
        self.run_dir = context.run.path
        self.model = model
        self.optimizer = optimizer
        self.progress = Progress()
        self._log = log
        self.batch_size = 0
        self.evaluation_follows = self.over = False
        self.keep = keep
        self.ending: str | None = None
        """The reason why this process asks for the end of training; None if it does not."""

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def epoch(self) -> int:
        return self.progress.position.epoch

    def log(self, name: str, value: float) -> None:
        try:
            self._log(name, float(value))
        except (TypeError, ValueError):
            raise DtrainError(
                f"session.log({name!r}, {value!r}): it takes a number",
                code="task.log-not-a-number",
            ) from None

    def keep_best(self) -> None:
        self.keep(Keep())

    def stop(self, reason: str) -> None:
        self.ending = self.ending or reason


class Callbacks:
    """Calls all callbacks, the user's first, so that a checkpoint contains their state."""

    def __init__(self, context: TrainContext, view: View, *, evaluates: bool) -> None:
        spec = context.spec
        self.view = view
        self._all: dict[str, Callback] = {}
        self._loaded: dict[str, Any] = {}
        given = listed(context.task.callbacks())
        # the task of a library may have the callbacks of that library
        adapt = getattr(context.task, "as_callbacks", None)
        for index, each in enumerate(adapt(given) if adapt else given):
            if not isinstance(each, Callback):
                kind = type(each).__name__
                raise DtrainError(
                    f"callbacks() returned a {kind}, not a dtrain.Callback",
                    code="task.bad-callbacks",
                )
            self._all[f"{type(each).__name__}.{index}"] = each
        self._of_user = bool(self._all)
        if spec.train.early_stopping is not None:
            if spec.eval.every_steps is None and spec.eval.every_epochs is None:
                raise UsageError(
                    "train.early_stopping needs eval.every_steps or eval.every_epochs",
                    code="job.no-evaluation-to-stop-by",
                )
            self._all["early_stopping"] = EarlyStopping(spec.train.early_stopping)
        if spec.checkpoint.best is not None:
            self._all["best"] = KeepBest(spec.checkpoint.best, view.keep)
        needing = {"early_stopping": "train.early_stopping", "best": "checkpoint.best"}
        for name, field in needing.items():
            if name in self._all and not evaluates:
                raise UsageError(
                    f"{field} needs a task with eval_dataset()",
                    code="eval.no-data",
                )

    @property
    def each(self) -> list[Callback]:
        return list(self._all.values())

    def add(self, name: str, callback: Callback) -> None:
        """Add a callback of a trainer, and load its state if the checkpoint had one."""
        self._all[name] = callback
        self.load_state_dict({name: self._loaded[name]} if name in self._loaded else {})

    def start(self, progress: Progress) -> None:
        self.view.progress = progress
        self._call("on_start")

    def step(self, loss: float, *, ends_epoch: bool) -> bool:
        """Call the hooks after a step. Return whether training ends.

        Ranks agree on that only at the end of an epoch.
        """
        self._call("on_step", loss)
        if not ends_epoch:
            return False
        self._call("on_epoch")
        return self._agreed()

    def evaluated(self, metrics: Mapping[str, float]) -> bool:
        """Call the hooks after an evaluation. Return whether training ends; all ranks agree."""
        self._call("on_eval", metrics)
        return self._agreed()

    def _agreed(self) -> bool:
        reason = self.view.ending
        if self._of_user:
            reason = next((r for r in collectives.gather_to_all(reason) if r is not None), None)
        if reason is not None and self.view.rank == 0:
            logger.info("training ends after step %d: %s", self.view.step, reason)
        return reason is not None

    def saved(self, folder: Path) -> None:
        self._call("on_checkpoint", folder)

    def end(self) -> None:
        self._call("on_end")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every callback that has state.

        Raises:
            DtrainError: a checkpoint could not restore it.
        """
        states = {}
        for name, each in self._all.items():
            try:
                state = each.state_dict()
            except Exception as error:
                _add_note(error, each, "state_dict")
                raise
            refuse_unreadable(state, f"state_dict() of callback {name.partition('.')[0]}")
            states[name] = state
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. New callbacks keep their initial state."""
        self._loaded = {**self._loaded, **states}
        for name, each in self._all.items():
            if name in states:
                with restoring(f"callback {name.partition('.')[0]}"):
                    each.load_state_dict(states[name])

    def _call(self, hook: str, *given: Any) -> None:
        for each in self._all.values():
            try:
                getattr(each, hook)(self.view, *given)
            except Exception as error:
                _add_note(error, each, hook)
                raise


def _add_note(error: Exception, callback: Callback, method: str) -> None:
    """Add the name of the callback to an error; dtrain's own errors contain it already."""
    if not isinstance(error, DtrainError):
        error.add_note(f"in {method}() of callback {type(callback).__name__}")
