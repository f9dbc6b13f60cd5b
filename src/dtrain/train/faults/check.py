"""Faults on purpose that cannot be made: told before the first step, or at the end of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dtrain.errors import BlamedError, UsageError
from dtrain.job.faults import TENSOR_KINDS, Injection
from dtrain.train import collectives
from dtrain.train.checkpoint.state import plain_name
from dtrain.train.checks.train_state import TrainState

_SHOWN = 8


class NeverMadeError(BlamedError):
    """A fault was asked for, and nothing came by in which it could be made."""


def refuse_impossible(
    faults: Sequence[Injection], subject: TrainState, total_steps: int | None
) -> None:
    """Say of all faults, on all ranks alike, what cannot be meant.

    Args:
        faults: of all ranks.
        subject: what is trained.
        total_steps: of the training; None: nobody knows.

    Raises:
        UsageError: which fault, and why it cannot be made.
    """
    for fault in faults:
        if total_steps is not None and fault.step > total_steps:
            raise _error(fault, f"step {fault.step} is beyond the last, {total_steps}")
        if fault.kind == "nan-gradient" or fault.kind in TENSOR_KINDS:
            _refuse_place(fault, subject)


def refuse_unmade(waiting: Sequence[Injection], last_step: int, rank: int) -> None:
    """At the end of a training, on all ranks that had faults to make: all must have been made.

    Args:
        waiting: those of this rank that were not.
        last_step: how many steps there were.
        rank: this one.

    Raises:
        NeverMadeError: on all ranks; says which fault, and why.
    """
    everyone = collectives.gather_to_all([_unmade(fault, last_step) for fault in waiting])
    lines = [line for theirs in everyone for line in theirs]
    if lines:
        culprits = [number for number, theirs in enumerate(everyone) if theirs]
        raise NeverMadeError("\n".join(lines), culprits, rank)


def _refuse_place(fault: Injection, subject: TrainState) -> None:
    parameters = {plain_name(name): each for name, each in subject.model.named_parameters()}
    tensors: Mapping[str, torch.Tensor] = parameters
    what = "parameter"
    if fault.kind in TENSOR_KINDS and fault.target == "buffer":
        tensors, what = dict(subject.model.named_buffers()), "buffer"
        if not tensors:
            raise _error(fault, "the model has no buffers")
    found = [each for name, each in tensors.items() if _may_be(name, fault)]
    if not found:
        listed = ", ".join(list(tensors)[:_SHOWN]) + (", …" if len(tensors) > _SHOWN else "")
        raise _error(fault, f"there is no {what} {fault.param!r}; there are: {listed}")
    last = fault.element + (fault.kind in TENSOR_KINDS and fault.action == "swap")
    largest = max(each.numel() for each in found)
    if last >= largest:
        raise _error(
            fault, f"element {last} is not one of {fault.param or 'any ' + what}'s {largest}"
        )
    bits = max(8 * each.element_size() for each in found)
    if fault.bit is not None and fault.bit >= bits:
        raise _error(fault, f"bit {fault.bit} is not one of an element's {bits}")


def _may_be(name: str, fault: Injection) -> bool:
    """Whether a parameter or buffer is meant, or one of the optimizer's tensors of it."""
    of_optimizer = "moment" in fault.kind and is_named(str(fault.param), name)
    return is_named(name, fault.param) or of_optimizer


def is_named(name: str, param: str | None) -> bool:
    """Whether `param` means the tensor of this name; None means any."""
    return param is None or name == param or name.startswith(f"{param}.")


def _unmade(fault: Injection, last_step: int) -> str:
    why = f"nothing came by in step {fault.step} in which it could be made"
    if fault.step > last_step:
        why = f"training ended after step {last_step}"
    elif fault.kind in ("skip-collective", "swap-collectives"):
        why = f"the task called no collective itself in step {fault.step}"
    return f"--inject {fault.kind}: never made on rank {fault.rank}: {why}"


def _error(fault: Injection, why: str) -> UsageError:
    return UsageError(f"--inject {fault.kind} on rank {fault.rank}: {why}")
