"""What the catalog names of Lightning: a LightningModule as a task, and the trainer.

Workers are forked from a process that has imported this, so nothing of Lightning is imported
before the user's code has chosen one of its two packages.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from dtrain.integrations.lightning.package import PACKAGES, want
from dtrain.task import Task
from dtrain.train.context import TrainContext
from dtrain.train.importing import job_problem
from dtrain.train.seeding import RandomState


class LightningAdapter:
    def matches(self, factory: Callable[..., Any], trainer: str) -> bool:
        """What a function returns tells; nobody returns a module without an import of Lightning."""
        imported = any(package in sys.modules for package in PACKAGES)
        if inspect.isclass(factory):
            return _package_of(factory) is not None
        return trainer == "lightning" and imported

    def adapt(self, make: functools.partial[Any], name: str, trainer: str) -> Task | None:
        """The module itself is made when its model is asked for."""
        kind = make.func
        if not inspect.isclass(kind):  # made for this only, as if it had not been
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
        want(package)
        from dtrain.integrations.lightning.module import ModuleTask

        return ModuleTask(make, name)


def make_trainer(context: TrainContext) -> Any:
    """Trainer `lightning`."""
    from dtrain.integrations.lightning.choice import make_trainer

    return make_trainer(context)


def _package_of(factory: Any) -> str | None:
    """The package whose LightningModule a class derives from; None when it does from neither."""
    for base in getattr(factory, "__mro__", ()):
        package: str = base.__module__.removesuffix(".core.module")
        if base.__name__ == "LightningModule" and package in PACKAGES:
            return package
    return None
