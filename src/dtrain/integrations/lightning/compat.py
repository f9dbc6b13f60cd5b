"""All that is used of Lightning, from the package that the user's code is written with."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dtrain.integrations.lightning.package import wanted

PACKAGE = wanted()
"""`pytorch_lightning` or `lightning.pytorch`."""

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = importlib.import_module(PACKAGE)


def _part(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


call: Any = _part("trainer.call")
is_overridden: Any = _part("utilities.model_helpers").is_overridden
rank_zero_only: Any = _part("utilities").rank_zero_only
ClusterEnvironment: Any = _part("plugins.environments").ClusterEnvironment
DDPStrategy: Any = _part("strategies").DDPStrategy
LRSchedulerConfig: Any = _part("utilities.types").LRSchedulerConfig
TorchCheckpointIO: Any = _part("plugins.io").TorchCheckpointIO

__all__ = [
    "PACKAGE",
    "ClusterEnvironment",
    "DDPStrategy",
    "LRSchedulerConfig",
    "TorchCheckpointIO",
    "call",
    "is_overridden",
    "pl",
    "rank_zero_only",
]
