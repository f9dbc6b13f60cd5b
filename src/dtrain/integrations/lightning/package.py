"""The choice between Lightning's two packages: this process uses the one of the user's code.

Lightning is the same code in `pytorch_lightning` and `lightning`, but with separate classes.
`compat` takes its names from one of them when it is imported, so `adapter` imports it late.
"""

from __future__ import annotations

import sys

from dtrain.errors import DtrainError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

_chosen: str | None = None


def choose(package: str) -> None:
    """Choose one of the packages; without a choice, it is the one that is imported already.

    Raises:
        DtrainError: this process uses the other one.
    """
    global _chosen
    compat = sys.modules.get("dtrain.integrations.lightning.compat")
    if compat is not None and package != compat.PACKAGE:
        raise DtrainError(
            f"this process trains with {compat.PACKAGE}; a module of {package} needs another "
            "process",
            code="lightning.two-packages",
        )
    _chosen = package


def chosen() -> str:
    imported = [name for name in PACKAGES if name in sys.modules]
    return _chosen or (imported[0] if len(imported) == 1 else PACKAGES[0])
