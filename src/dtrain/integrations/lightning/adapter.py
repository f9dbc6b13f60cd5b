"""What the catalog names of Lightning: a LightningModule as a task, and the trainer.

Workers are forked from a process that has imported this, so nothing of Lightning is imported
before the user's code has chosen one of its two packages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dtrain.integrations.lightning.package import PACKAGES, want
from dtrain.task import Task
from dtrain.train.context import TrainContext
from dtrain.train.importing import job_problem
from dtrain.train.loop.native import NativeTrainer


class LightningAdapter:
    def matches(self, factory: Callable[..., Any]) -> bool:
        return _package_of(factory) is not None

    def adapt(self, make: functools.partial[Any], name: str, trainer: str) -> Task:
        """The module itself is made when its model is asked for."""
        if trainer != "lightning":
            raise job_problem("task", f"{name} is a LightningModule; set trainer: lightning")
        want(str(_package_of(make.func)))
        from dtrain.integrations.lightning.module import ModuleTask

        return ModuleTask(make, name)


def make_trainer(context: TrainContext) -> NativeTrainer:
    """Trainer `lightning`."""
    from dtrain.integrations.lightning.trainer import LightningTrainer

    return LightningTrainer(context)


def _package_of(factory: Any) -> str | None:
    """The package whose LightningModule a class derives from; None when it does from neither."""
    for base in getattr(factory, "__mro__", ()):
        package: str = base.__module__.removesuffix(".core.module")
        if base.__name__ == "LightningModule" and package in PACKAGES:
            return package
    return None
