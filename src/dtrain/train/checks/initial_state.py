"""Comparisons before the first step, before anything overwrites a difference.

DDP's constructor compares shapes. Then it copies the first rank's values to every rank, without a
warning.
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

from dtrain.job.spec import JobSpec
from dtrain.task import Task
from dtrain.train import collectives, digest
from dtrain.train.checkpoint.state import plain_name, plain_parameters
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


def compare_model(model: torch.nn.Module, spec: JobSpec) -> None:
    """Make sure that all ranks start from the same model.

    Args:
        model: the model as the task built it, on its device, not yet sharded or wrapped.
        spec: the job. With `checks.init: broadcast`, log a warning if values differ, and use the
            first rank's values.

    Raises:
        ReplicaError: names, shapes, types, their order or requires_grad differ. Without
            `broadcast`, also if values differ.
    """
    tensors = _state(model)
    _agree(
        "model() built a different model on some ranks; it must not depend on the rank",
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
        for name, expected, found in zip(
            tensors, everyone[ballot.reference], everyone[suspect], strict=True
        )
        if expected != found
    ]
    where = element_difference(names[0], tensors[names[0]], ballot.reference, suspect)
    more = f", and in {len(names) - 1} more tensors" if len(names) > 1 else ""
    text = (
        "model() made different initial values on the ranks, although all have the same seed:\n"
        f"{where}{more}"
    )
    if spec.checks.init == "same":
        hint = "draw them from the generators of torch, NumPy or Python, not from the rank, "
        if spec.checkpoint.init_from is not None:
            hint = f"make sure that {spec.checkpoint.init_from} is the same on all hosts, {hint}"
        raise ReplicaError(
            f"{text}\n{hint}or set checks.init: broadcast to use rank 0's values",
            ballot.culprits,
            dist.get_rank(),
            code="check.initial-values-differ",
        )
    logger.warning("%s; all ranks use the values of rank 0", text)
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
        "optimizer() built a different optimizer on some ranks",
        facts,
        code="check.optimizer-differs",
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
    expected = everyone[ballot.reference]
    for rank, found in enumerate(everyone):
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                raise ReplicaError(
                    f"{problem}:\n{key} is {found.get(key)} on rank {rank} and "
                    f"{expected.get(key)} on rank {ballot.reference}",
                    ballot.culprits,
                    dist.get_rank(),
                    code=code,
                )


def _code(task: Task) -> str:
    """Return a digest of the file that defines the task's class."""
    defined = type(getattr(task, "adapted", task))  # dtrain wraps classes of other frameworks
    file = getattr(sys.modules.get(defined.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        return "none"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
