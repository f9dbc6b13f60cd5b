"""All names that dtrain uses of Lightning, from the package that the user's code uses."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dtrain.integrations.lightning.package import chosen

PACKAGE = chosen()
"""The package's name: `pytorch_lightning` or `lightning.pytorch`."""

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    pl = importlib.import_module(PACKAGE)


def _part(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


call: Any = _part("trainer.call")
is_overridden: Any = _part("utilities.model_helpers").is_overridden
rank_zero_only: Any = _part("utilities").rank_zero_only
CombinedLoader: Any = _part("utilities.combined_loader").CombinedLoader
ClusterEnvironment: Any = _part("plugins.environments").ClusterEnvironment
DDPStrategy: Any = _part("strategies").DDPStrategy
ResultCollection: Any = _part("trainer.connectors.logger_connector.result")._ResultCollection
MisconfigurationException: Any = _part("utilities.exceptions").MisconfigurationException
extract_batch_size: Any = _part("utilities.data").extract_batch_size
set_sampler_epoch: Any = _part("loops.fit_loop")._set_sampler_epoch
sized_len: Any = _part("loops.fit_loop").sized_len
TunerExit: Any = _part("utilities.exceptions")._TunerExitException
LRSchedulerConfig: Any = _part("utilities.types").LRSchedulerConfig
TorchCheckpointIO: Any = _part("plugins.io").TorchCheckpointIO


def after(owner: Any, name: str, then: Callable[[], None]) -> None:
    """Replace a method of an object: after each call, it calls `then` too."""
    method = getattr(owner, name)

    def both(*given: Any, **named: Any) -> Any:
        result = method(*given, **named)
        then()
        return result

    setattr(owner, name, both)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress Lightning's warnings: about loader processes, torch and DDP's options."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
        warnings.filterwarnings("ignore", message="find_unused_parameters=True")
        yield


__all__ = [
    "PACKAGE",
    "ClusterEnvironment",
    "CombinedLoader",
    "DDPStrategy",
    "LRSchedulerConfig",
    "MisconfigurationException",
    "ResultCollection",
    "TorchCheckpointIO",
    "TunerExit",
    "after",
    "call",
    "extract_batch_size",
    "is_overridden",
    "pl",
    "quietly",
    "rank_zero_only",
    "set_sampler_epoch",
    "sized_len",
]
