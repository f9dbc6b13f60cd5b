"""The catalog's entries for Lightning: a LightningModule as a task, and the trainer.

Workers are forked from a process that has imported this module. So it imports nothing of Lightning
before the user's code has chosen one of its two packages.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from dtrain.integrations.lightning.package import PACKAGES, choose
from dtrain.task import Task
from dtrain.train.context import TrainContext
from dtrain.train.importing import job_problem
from dtrain.train.seeding import RandomState


class LightningAdapter:
    def matches(self, factory: Callable[..., Any], trainer: str) -> bool:
        """Return whether the factory is a LightningModule class, or a function that may return one.

        A function can return one only if Lightning is imported; `adapt` looks at the result.
        """
        imported = any(package in sys.modules for package in PACKAGES)
        if inspect.isclass(factory):
            return _package_of(factory) is not None
        return trainer == "lightning" and imported

    def adapt(self, make: functools.partial[Any], name: str, trainer: str) -> Task | None:
        """Return a task for the module, which is made when the task's model is requested."""
        kind = make.func
        if not inspect.isclass(kind):  # called for its class alone, without effect on the seeds
            before = RandomState.capture()
            kind = type(make())
            before.restore()
        package = _package_of(kind)
        if package is None:
            return None
        if trainer != "lightning":
            raise job_problem(
                "task",
                f"{name} is a LightningModule; set trainer: lightning",
                code="lightning.needs-trainer",
            )
        choose(package)
        from dtrain.integrations.lightning.module import ModuleTask

        return ModuleTask(make, name)


def make_trainer(context: TrainContext) -> Any:
    """Trainer `lightning`."""
    from dtrain.integrations.lightning.choice import make_trainer

    return make_trainer(context)


def _package_of(factory: Any) -> str | None:
    """Return the package whose LightningModule a class derives from, or None."""
    for base in getattr(factory, "__mro__", ()):
        package: str = base.__module__.removesuffix(".core.module")
        if base.__name__ == "LightningModule" and package in PACKAGES:
            return package
    return None
