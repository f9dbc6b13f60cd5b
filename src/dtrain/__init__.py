"""dtrain: one training definition, launched anywhere, provably the same training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtrain.callback import Callback
from dtrain.task import Loss, Task

if TYPE_CHECKING:
    from dtrain.api.launching import launch, plan, resume, verify
    from dtrain.api.run import Run, runs
    from dtrain.integrations.script.checkpoint import Checkpoint as checkpoint
    from dtrain.integrations.script.sampler import Sampler as sampler
    from dtrain.integrations.script.stopping import stopping
    from dtrain.train.checks.api import check
    from dtrain.train.ema import EMA

__all__ = [
    "EMA",
    "Callback",
    "Loss",
    "Run",
    "Task",
    "check",
    "checkpoint",
    "launch",
    "plan",
    "rank",
    "resume",
    "runs",
    "sampler",
    "stopping",
    "sweep",
    "verify",
    "world_size",
]
__version__ = "0.1.0"

# Most of them import torch, which the launch plane must not import. The others import pydantic.
_LAZY = {
    "EMA": "dtrain.train.ema:EMA",
    "Run": "dtrain.api.run:Run",
    "check": "dtrain.train.checks.api:check",
    "checkpoint": "dtrain.integrations.script.checkpoint:Checkpoint",
    "launch": "dtrain.api.launching:launch",
    "plan": "dtrain.api.launching:plan",
    "resume": "dtrain.api.launching:resume",
    "runs": "dtrain.api.run:runs",
    "sampler": "dtrain.integrations.script.sampler:Sampler",
    "stopping": "dtrain.integrations.script.stopping:stopping",
    "sweep": "dtrain.api.launching:sweep",
    "verify": "dtrain.api.launching:verify",
}


def rank() -> int:
    """Return the rank of this process in the training; 0 outside of a launch."""
    from dtrain.ranks import RankInfo

    return RankInfo.from_env().rank


def world_size() -> int:
    """Return the number of processes in the training; 1 outside of a launch."""
    from dtrain.ranks import RankInfo

    return RankInfo.from_env().world_size


def __getattr__(name: str) -> Any:
    """Import a large attribute when it is first used."""
    if name in _LAZY:
        import importlib

        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
