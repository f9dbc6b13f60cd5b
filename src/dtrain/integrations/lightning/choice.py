"""The choice between dtrain's step and Lightning's own loops for a LightningModule."""

from __future__ import annotations

import functools
import logging
from typing import Any

from dtrain.catalog import own_loops_problem, own_loops_setting_problem
from dtrain.errors import DtrainError, UsageError
from dtrain.integrations.lightning.compat import PACKAGE, pl
from dtrain.integrations.lightning.job_check import LOOPS_ARGUMENTS
from dtrain.integrations.lightning.loops.trainer import LoopsTrainer
from dtrain.integrations.lightning.module import ModuleTask
from dtrain.integrations.lightning.needs_loops import NeedsLoopsError
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.importing import load_class
from dtrain.train.metrics.events import Events

logger = logging.getLogger(__name__)


def make_trainer(context: TrainContext) -> Any:
    """Return the trainer for the job's `lightning.step`.

    Raises:
        UsageError: the task is not a LightningModule, and the job sets a field for one.
    """
    task, section = context.task, context.spec.lightning
    arguments = [name for name in section.trainer if name in LOOPS_ARGUMENTS]
    if not isinstance(task, ModuleTask):
        for field, is_set in (
            ("data_module", section.data_module is not None),
            ("step: lightning", section.step == "lightning"),
            ("also_run", bool(section.also_run)),
            (f"trainer.{arguments[0]}" if arguments else "", bool(arguments)),
        ):
            if is_set:
                raise UsageError(
                    f"lightning.{field} is for a LightningModule; this is a task",
                    code="job.field-without-effect",
                )
        return LightningTrainer(context)
    if section.data_module is not None:
        make = load_class("lightning.data_module", section.data_module, context.code_dir)
        task.make_data_module = functools.partial(_data_module, make, section.data_args)
    if section.step == "lightning":
        return LoopsTrainer(context)
    if section.also_run:
        return _Loops(context, f"lightning.also_run: {section.also_run[0]} is one of them")
    if arguments:
        return _Loops(context, f"lightning.trainer.{arguments[0]} is about Lightning's own loops")
    return _Step(context, allow_loops=section.step == "auto")


class _Step:
    """A trainer that uses dtrain's step, or Lightning's loops if the module needs them."""

    def __init__(self, context: TrainContext, *, allow_loops: bool) -> None:
        self._context = context
        self._allow_loops = allow_loops

    def run(self) -> TrainResult:
        try:
            return LightningTrainer(self._context).run()
        except NeedsLoopsError as error:
            if not self._allow_loops:
                raise UsageError(
                    f"{error}; lightning.step: dtrain cannot train that: remove that field",
                    code="lightning.needs-own-loops",
                ) from None
            why = str(error)
        return _Loops(self._context, why).run()


class _Loops:
    """A trainer that uses Lightning's own loops, and logs the reason."""

    def __init__(self, context: TrainContext, why: str) -> None:
        self._context = context
        self._why = why

    def run(self) -> TrainResult:
        context = self._context
        problem = own_loops_problem(context.spec.strategy)
        if problem is not None:
            raise UsageError(f"{self._why}; and {problem}", code="plan.unsupported-combination")
        setting = own_loops_setting_problem(context.spec.train.model_dump())
        if setting is not None:
            text = f"{self._why}; and train.{setting[0]} {setting[1]}"
            raise UsageError(text, code="plan.unsupported-combination")
        if context.ranks.is_rank_zero:
            logger.warning("using Lightning's own loops: %s", self._why)
        Events(context.run, context.ranks, context.attempt).write("own_loops", why=self._why)
        return LoopsTrainer(context).run()


def _data_module(make: Any, args: dict[str, Any]) -> Any:
    made = make(**args)
    if not isinstance(made, pl.LightningDataModule):
        raise DtrainError(
            f"lightning.data_module is a {type(made).__name__}, not a LightningDataModule of "
            f"{PACKAGE}",
            code="lightning.not-a-data-module",
        )
    return made
