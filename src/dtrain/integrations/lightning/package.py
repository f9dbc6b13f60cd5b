"""Which of Lightning's two packages this process uses: that of the user's code.

Lightning is one code in `pytorch_lightning` and `lightning`, whose classes know nothing of each
other. `compat` takes its names from one of them when it is imported, which `adapter` puts off.
"""

from __future__ import annotations

import sys

from dtrain.errors import DtrainError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

_wanted: str | None = None


def want(package: str) -> None:
    """Say which of the packages is to be used; without, it is the one that is imported already.

    Raises:
        DtrainError: this process uses the other one.
    """
    global _wanted
    compat = sys.modules.get("dtrain.integrations.lightning.compat")
    if compat is not None and package != compat.PACKAGE:
        raise DtrainError(
            f"this process trains with {compat.PACKAGE}; a module of {package} needs another one",
            code="lightning.two-packages",
        )
    _wanted = package


def wanted() -> str:
    imported = [name for name in PACKAGES if name in sys.modules]
    return _wanted or (imported[0] if len(imported) == 1 else PACKAGES[0])
