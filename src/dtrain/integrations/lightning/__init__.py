"""Lightning's loop, hooks, callbacks and loggers around dtrain's step.

Lightning is one code in two packages, `pytorch_lightning` and `lightning`, whose classes know
nothing of each other. The modules here take the one that the user's code is written with: so
none of them is imported before that is, which is what this one is for.
"""

from __future__ import annotations

import sys

from dtrain.errors import DtrainError
from dtrain.train.context import TrainContext
from dtrain.train.loop import native

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

_wanted: str | None = None


def make_trainer(context: TrainContext) -> native.NativeTrainer:
    """Trainer `lightning`."""
    from dtrain.integrations.lightning.trainer import LightningTrainer

    return LightningTrainer(context)


def want(package: str) -> None:
    """Say which of the packages is to be used; without, it is the one that is imported already.

    Raises:
        DtrainError: this process uses the other one.
    """
    global _wanted
    library = sys.modules.get(f"{__name__}.compat")
    if library is not None and package != library.PACKAGE:
        raise DtrainError(
            f"this process trains with {library.PACKAGE}; a module of {package} needs another one"
        )
    _wanted = package


def wanted() -> str:
    """The package to use."""
    imported = [name for name in PACKAGES if name in sys.modules]
    return _wanted or (imported[0] if len(imported) == 1 else PACKAGES[0])
