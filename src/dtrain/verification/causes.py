"""Derives the likely cause from the way in which a gradient, an update or a metric is wrong.

It works on recordings in fp64, where rounding does not interfere: a factor of 2 is 2 to 12 digits.
"""

from __future__ import annotations

import math

import numpy as np

from dtrain.trace import Recording, StepRecord, Tensors, Vector
from dtrain.verification import losses
from dtrain.verification.case import Case
from dtrain.verification.clauses import (
    BUFFERS,
    CLIPPING,
    EVALUATION,
    GRADIENT,
    SCALER,
    UPDATE,
    Finding,
)
from dtrain.verification.compare import L1, apart
from dtrain.words import few

_CLIPPED = 1 - 1e-4
"""A clipped gradient is as long as the limit, except for torch's 1e-6 against a division by 0."""

_SLIGHT = 1e-3
"""Parts whose sizes differ by some fraction change their mean by about that fraction. A change of
less than a thousandth of it has another cause.
"""

_FACTOR = 1e-6
"""A gradient counts as a multiple of another if the remainder is at most this fraction of it."""


def explain(case: Case) -> Finding:
    """Return the clause that fails, and the likely cause."""
    what = case.excess.what
    if what in ("loss", "gradient norm", "gradients"):
        return _gradient(case)
    if what == "parameters":
        return _update(case)
    return _buffers(case) if what == "buffers" else _evaluation(case)


def _gradient(case: Case) -> Finding:
    if losses.losses_differ(case):
        return losses.unknown(case)
    return (
        _by_factor(case)
        or _by_some_parameters(case)
        or _by_clipping(case)
        or _by_unequal_parts(case)
        or case.finding(str(case), _unknown(case))
    )


def _unknown(case: Case) -> str:
    if case.pair.micro_batch_size is not None:
        return "accumulated gradients are reduced more than once, or divided by their number"
    return "the ranks' gradients are added with wrong weights, or changed on one rank (a hook)"


def _by_clipping(case: Case) -> Finding | None:
    """Return a finding if the gradient is a mean of clipped gradients.

    Such a mean is shorter than a clipped mean.
    """
    limit = case.spec.train.clip_grad_norm
    ours, theirs = (each.steps[case.step].gradients.norm() for each in (case.reference, case.other))
    if limit is None or ours < limit * _CLIPPED or theirs >= limit * _CLIPPED:
        return None
    found = f"the gradient, clipped to {limit:g}, has a norm of {theirs:.4g}"
    likely = "each rank clips its own gradient before the reduction"
    return case.finding(found, likely, CLIPPING)


def _by_factor(case: Case) -> Finding | None:
    factor = _multiple(*_side_by_side(*_gradients(case)))
    if factor is None or abs(factor - 1) < _FACTOR:
        return None
    found = f"the gradient is {factor:.6g} times the reference's"
    clause, likely = _meaning(factor, case)
    return case.finding(found, likely, clause)


def _meaning(factor: float, case: Case) -> tuple[str, str]:
    """Return (clause, likely cause) of a gradient that is a constant multiple of the right one."""
    parts, size = case.pair.parts, len(case.reference.ids(case.step))
    micro = max((len(line.ids) for line in case.other.lines(case.step)), default=1)
    weight = _weight(case.reference, case.step)
    known = [
        (parts, f"gradients are added over the {parts} processes and not divided"),
        (1 / parts, f"gradients are divided by the {parts} processes once more (wrapped twice?)"),
        (parts**2, f"gradients are multiplied by {parts} twice"),
        (micro, f"the {micro} accumulated micro-batches are added and not divided"),
        (1 / micro, f"gradients are divided by the {micro} micro-batches once more"),
        (size, "a sum over the samples is taken for a mean"),
        (1 / size, "a mean over the samples is divided by their number once more"),
        (weight / size, "gradients are divided by the number of samples instead of the weights"),
        (size / weight, "gradients are divided by the weights instead of the number of samples"),
    ]
    if factor >= 256 and math.log2(factor) % 1 == 0:
        return SCALER, f"the loss scale {factor:g} is never taken out again"
    for value, meaning in known:
        if value != 1 and abs(factor / value - 1) < _FACTOR:
            return GRADIENT, meaning
    return GRADIENT, "one division too many, too few, or by another number"


def _by_some_parameters(case: Case) -> Finding | None:
    """Return a finding if only some tensors differ, and the others not at all."""
    ours, theirs = _gradients(case)
    if ours.vectors.keys() ^ theirs.vectors.keys():
        strangers = sorted(ours.vectors.keys() ^ theirs.vectors.keys())
        found = f"{strangers[0]} has a gradient on one side only"
        return Finding(GRADIENT, found, "unused parameters are treated differently", case.step)
    bad = [name for name in ours.vectors if _is_apart(ours, theirs, name)]
    if not 0 < len(bad) < len(ours.vectors):
        return None
    found = f"{len(bad)} of {len(ours.vectors)} parameters have another gradient: {few(bad)}"
    return case.finding(found, "not reduced, or reduced twice, or changed on one rank (a hook)")


def _by_unequal_parts(case: Case) -> Finding | None:
    """Return a finding if means over unequal parts have equal weights."""
    sizes = _weights_of_ranks(case.other, case.step)
    if sizes is None or len(set(sizes)) == 1 or case.pair.micro_batch_size is not None:
        return None
    mean = math.fsum(sizes) / len(sizes)
    if case.shown.value < _SLIGHT * max(abs(size / mean - 1) for size in sizes):
        return None
    likely = f"a mean of means: ranks hold weights of {few(sizes)} but count alike"
    return case.finding(str(case), likely)


def _update(case: Case) -> Finding:
    found = str(case)
    if case.pair.resume_after is not None and case.step == case.pair.resume_after + 1:
        likely = "the optimizer's state was not restored with the checkpoint"
        return case.finding(found, likely, UPDATE)
    factor = _multiple(*(_moves(each, case.step) for each in (case.reference, case.other)))
    likely = "the optimizer's settings or state depend on the number of processes"
    if factor is not None and abs(factor - 1) > _FACTOR:
        likely = f"parameters move {factor:.6g} times as far from the same gradient: "
        likely += "updated more than once, or with another learning rate"
    return case.finding(found, likely, UPDATE)


def _buffers(case: Case) -> Finding:
    name, step = case.excess.tensor, case.step
    before, after, theirs = (
        case.reference.steps[step - 1].buffers.vectors.get(name),
        case.reference.steps[step].buffers.vectors.get(name),
        case.other.steps[step].buffers.vectors.get(name),
    )
    likely = "each process updates it from its own samples"
    if before is not None and theirs is not None and after is not None:
        stale = before.shape == theirs.shape and not np.any(before - theirs)
        if stale and np.any(after - theirs):
            likely = "a stale copy of the buffer is put back after the step"
    return Finding(BUFFERS, f"buffer {name} has another value", likely, step, name)


def _evaluation(case: Case) -> Finding:
    name = case.excess.what.removeprefix("metric ")
    ours, theirs = case.reference.metrics.get(name), case.other.metrics.get(name)
    found = f"{name} is {theirs}, not {ours}, of the same parameters"
    likely = "samples are repeated or dropped to make shares equal, or ranks' means are averaged"
    return Finding(EVALUATION, found, likely, case.step)


# -- numbers ---------------------------------------------------------------------------------


def _gradients(case: Case) -> tuple[Tensors, Tensors]:
    """Return the reduced gradients of both sides, before clipping."""
    limit = case.spec.train.clip_grad_norm
    ours, theirs = (each.steps[case.step] for each in (case.reference, case.other))
    return _before_clipping(ours, limit), _before_clipping(theirs, limit)


def _before_clipping(record: StepRecord, limit: float | None) -> Tensors:
    """Return the gradients before torch's clip_grad_norm_.

    That function multiplies by limit / (norm + 1e-6) if this is below 1.
    """
    if limit is None or record.grad_norm is None:
        return record.gradients
    factor = max(1.0, (record.grad_norm + 1e-6) / limit)
    given = record.gradients
    return Tensors(
        {name: vector * factor for name, vector in given.vectors.items()},
        given.digests,
        {name: norm * factor for name, norm in given.norms.items()},
    )


def _side_by_side(ours: Tensors, theirs: Tensors) -> tuple[Vector, Vector]:
    names = [
        name
        for name, vector in ours.vectors.items()
        if name in theirs.vectors and vector.shape == theirs.vectors[name].shape
    ]
    empty: list[Vector] = [np.empty(0)]
    return (
        np.concatenate([*(ours.vectors[name] for name in names), *empty]),
        np.concatenate([*(theirs.vectors[name] for name in names), *empty]),
    )


def _moves(recording: Recording, step: int) -> Vector:
    before, after = recording.steps[step - 1].parameters, recording.steps[step].parameters
    old, new = _side_by_side(before, after)
    return new - old


def _multiple(ours: Vector, theirs: Vector) -> float | None:
    """Return the factor by which `theirs` is a multiple of `ours`; None if it is not a multiple."""
    size = float(ours @ ours)
    if ours.shape != theirs.shape or size == 0 or not np.all(np.isfinite(theirs)):
        return None
    factor = float(ours @ theirs) / size
    rest = apart(factor * ours, theirs)
    return factor if rest <= _FACTOR * abs(factor) * math.sqrt(size) else None


def _is_apart(ours: Tensors, theirs: Tensors, name: str) -> bool:
    difference = apart(ours.vectors[name], theirs.vectors[name])
    return difference > L1.parameters * ours.norm()


def _weights_of_ranks(recording: Recording, step: int) -> list[float] | None:
    """Return each rank's weight in a step: the one from its loss, or its number of samples."""
    weights = []
    for line in recording.lines(step):
        given = [weight for _, weight in line.losses]
        known = [weight for weight in given if weight is not None]
        if len(known) == len(given):
            weights.append(math.fsum(known))
        else:
            weights.append(float(sum(map(len, line.ids))))
    return weights or None


def _weight(recording: Recording, step: int) -> float:
    return math.fsum(_weights_of_ranks(recording, step) or []) or 1.0
