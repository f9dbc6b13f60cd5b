"""The comparison of replicas as a function, for a user's own loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from dtrain.train import collectives
from dtrain.train.checks.replicas import Ledger, ReplicaError
from dtrain.train.checks.train_state import BUFFERS, TrainState

logger = logging.getLogger("dtrain.check")


@dataclass
class _Known:
    calls: int = 0
    agreed: int | None = None
    buffers_reported: bool = False


_KNOWN: WeakKeyDictionary[torch.nn.Module, _Known] = WeakKeyDictionary()


def check(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    *,
    every: int = 1,
) -> None:
    """Make sure that all ranks still hold the same model, bit for bit. All ranks must call it.

    The function compares gradients, parameters, optimizer state, learning rate and loss scale in
    one exchange of 112 bytes. Buffers that differ, for example BatchNorm's statistics under DDP,
    are reported once and are no error. It costs nothing in one process.

    Args:
        model: the model, which may be wrapped in DistributedDataParallel. Sharded parameters
            (FSDP) are not compared.
        optimizer, scheduler, scaler: the other objects that must be the same on all ranks.
        every: compare only at every n-th call.

    Raises:
        ReplicaError: ranks differ. The message names the rank that differs (with two ranks,
            both), the tensor and the element.
    """
    if not collectives.in_group():
        return
    while isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    known = _KNOWN.setdefault(model, _Known())
    known.calls += 1
    if known.calls % every:
        return
    optimizers, schedulers = (() if each is None else (each,) for each in (optimizer, scheduler))
    mismatch = Ledger(TrainState(model, optimizers, schedulers, scaler)).compare()
    if mismatch is None:
        known.agreed = known.calls
        return
    if mismatch.kinds == (BUFFERS,):
        known.agreed = known.calls
        if not known.buffers_reported:
            logger.warning("only buffers differ, which is reported once: %s", mismatch.text)
        known.buffers_reported = True
        return
    before = "" if known.agreed is None else f"were one model at call {known.agreed} and "
    raise ReplicaError(
        f"the replicas {before}are not one model at call {known.calls} of check():\n"
        f"{mismatch.text}",
        mismatch.culprits,
        dist.get_rank(),
    )
