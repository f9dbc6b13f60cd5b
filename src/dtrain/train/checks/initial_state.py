"""Comparisons before the first step, before anything overwrites what differs.

DDP's constructor compares shapes, then gives every rank the first one's values without a word.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.checkpoint.state import plain_name, plain_parameters
from dtrain.train.checks import digest
from dtrain.train.checks.replicas import ReplicaError, element_difference
from dtrain.train.vote import vote

logger = logging.getLogger(__name__)


def compare_surroundings(task: Task, seed: int) -> None:
    """Make sure that all ranks run the same code with the same versions and seed."""
    _agree(
        "the processes do not run the same program",
        {
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "the task's code": _code(task),
            "the seed": seed,
        },
        code="check.programs-differ",
    )


def compare_model(model: torch.nn.Module, *, broadcast: bool) -> None:
    """Make sure that all ranks start from the same model.

    Args:
        model: as the task built it, on its device, not yet cut or wrapped.
        broadcast: take the first rank's values where others differ, and say so.

    Raises:
        ReplicaError: names, shapes, types, their order or requires_grad differ; or values do.
    """
    tensors = _state(model)
    _agree(
        "model() built another model on some ranks; it must not depend on the rank",
        {
            name: f"{tuple(each.shape)} {each.dtype}"
            + (" trained" if each.requires_grad else "")
            + f", number {index}"
            for index, (name, each) in enumerate(tensors.items())
        },
        code="check.model-differs",
    )
    everyone = collectives.gather_to_all(digest.of_each(tensors.values()))
    if all(each == everyone[0] for each in everyone):
        return
    ballot = vote([tuple(each) for each in everyone])
    suspect = ballot.others[0]
    names = [
        name
        for name, ours, theirs in zip(
            tensors, everyone[ballot.reference], everyone[suspect], strict=True
        )
        if ours != theirs
    ]
    where = element_difference(names[0], tensors[names[0]], ballot.reference, suspect)
    more = f", and in {len(names) - 1} more tensors" if len(names) > 1 else ""
    text = (
        "model() gave different initial values on the ranks, though all were seeded alike:\n"
        f"{where}{more}"
    )
    if not broadcast:
        hint = "build the model from torch's, NumPy's or Python's generators, not from the rank, "
        raise ReplicaError(
            f"{text}\n{hint}or write checks.init: broadcast to take rank 0's values",
            ballot.culprits,
            dist.get_rank(),
            code="check.initial-values-differ",
        )
    logger.warning("%s; rank 0's are used everywhere", text)
    for tensor in tensors.values():
        dist.broadcast(tensor.detach(), src=0)


def compare_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make sure that all ranks have the same optimizer: kind, groups, settings."""
    names = {id(value): name for name, value in plain_parameters(model).items()}
    facts: dict[str, Any] = {"kind": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key == "params":
                value = [names.get(id(parameter), "?") for parameter in value]
            facts[f"{key} of group {index}"] = str(value)
    _agree(
        "optimizer() built another optimizer on some ranks", facts, code="check.optimizer-differs"
    )


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {plain_name(name): each for name, each in named.items()}


def _agree(problem: str, mine: Mapping[str, Any], *, code: str) -> None:
    """Raise `ReplicaError` unless all ranks have the same facts, in the same order."""
    if not collectives.in_group():
        return
    everyone = collectives.gather_to_all(dict(mine))
    ballot = vote([repr(list(theirs.items())) for theirs in everyone])
    ours = everyone[ballot.reference]
    for rank, theirs in enumerate(everyone):
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise ReplicaError(
                    f"{problem}:\n{key} is {theirs.get(key)} on rank {rank} and {ours.get(key)} "
                    f"on rank {ballot.reference}",
                    ballot.culprits,
                    dist.get_rank(),
                    code=code,
                )


def _code(task: Task) -> str:
    """A digest of the file in which the task's class stands."""
    written = type(getattr(task, "adapted", task))  # a class of its own is wrapped in ours
    file = getattr(sys.modules.get(written.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        return "none"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
