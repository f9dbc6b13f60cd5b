"""Derives the likely cause from the way in which a gradient, an update or a metric is wrong.

It works on recordings in fp64, where rounding does not interfere: a factor of 2 is 2 to 12 digits.
"""

from __future__ import annotations

import math

import numpy as np

from dtrain.trace import Recording, StepRecord, Tensors, Vector
from dtrain.verification import losses
from dtrain.verification.case import Case
from dtrain.verification.compare import L1, difference_norm
from dtrain.verification.rules import (
    BUFFERS,
    CLIPPING,
    EVALUATION,
    GRADIENT,
    SCALER,
    UPDATE,
    Finding,
)
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
    """Return the broken rule, and the likely cause."""
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
    if case.layout.micro_batch_size is not None:
        return "accumulated gradients are reduced more than once, or divided by their number"
    return "the ranks' gradients are added with wrong weights, or a hook changes them on one rank"


def _by_clipping(case: Case) -> Finding | None:
    """Return a finding if the gradient is a mean of clipped gradients.

    Such a mean is shorter than a clipped mean.
    """
    limit = case.spec.train.clip_grad_norm
    expected, actual = (
        each.steps[case.step].gradients.norm() for each in (case.reference, case.other)
    )
    if limit is None or expected < limit * _CLIPPED or actual >= limit * _CLIPPED:
        return None
    observation = f"the gradient is clipped to a norm of {limit:g}, but its norm is {actual:.4g}"
    cause = "each rank clips its own gradient before the reduction"
    return case.finding(observation, cause, CLIPPING)


def _by_factor(case: Case) -> Finding | None:
    factor = _multiple(*_side_by_side(*_gradients(case)))
    if factor is None or abs(factor - 1) < _FACTOR:
        return None
    observation = f"the gradient is {factor:.6g} times the reference's"
    rule, cause = _meaning(factor, case)
    return case.finding(observation, cause, rule)


def _meaning(factor: float, case: Case) -> tuple[str, str]:
    """Return (rule, likely cause) of a gradient that is a constant multiple of the right one."""
    parts, size = case.layout.parts, len(case.reference.ids(case.step))
    micro = max((len(line.ids) for line in case.other.lines(case.step)), default=1)
    weight = _weight(case.reference, case.step)
    known = [
        (parts, f"gradients are summed over the {parts} processes and not divided by {parts}"),
        (
            1 / parts,
            f"gradients are divided by the {parts} processes twice (is the model wrapped twice?)",
        ),
        (parts**2, f"gradients are multiplied by {parts} twice"),
        (micro, f"gradients of the {micro} micro-batches are summed and not divided by {micro}"),
        (1 / micro, f"gradients are divided by the {micro} micro-batches twice"),
        (size, "a sum over the samples is used as if it were their mean"),
        (1 / size, "a mean over the samples is divided by their number again"),
        (
            weight / size,
            "gradients are divided by the number of samples instead of the sum of weights",
        ),
        (
            size / weight,
            "gradients are divided by the sum of weights instead of the number of samples",
        ),
    ]
    if factor >= 256 and math.log2(factor) % 1 == 0:
        return SCALER, f"gradients are not divided by the loss scale, {factor:g}"
    for value, meaning in known:
        if value != 1 and abs(factor / value - 1) < _FACTOR:
            return GRADIENT, meaning
    return GRADIENT, "a division is missing, is done twice, or is by a wrong number"


def _by_some_parameters(case: Case) -> Finding | None:
    """Return a finding if only some tensors differ, and the others not at all."""
    expected, actual = _gradients(case)
    if expected.vectors.keys() ^ actual.vectors.keys():
        unmatched = sorted(expected.vectors.keys() ^ actual.vectors.keys())
        observation = f"{unmatched[0]} has a gradient in only one of the two runs"
        return Finding(
            GRADIENT, observation, "unused parameters are treated differently", case.step
        )
    bad = [name for name in expected.vectors if _differs(expected, actual, name)]
    if not 0 < len(bad) < len(expected.vectors):
        return None
    observation = (
        f"{len(bad)} of {len(expected.vectors)} parameters have a different gradient: {few(bad)}"
    )
    cause = "these gradients are not reduced, are reduced twice, or a hook changes them on one rank"
    return case.finding(observation, cause)


def _by_unequal_parts(case: Case) -> Finding | None:
    """Return a finding if means over unequal parts have equal weights."""
    sizes = _weights_of_ranks(case.other, case.step)
    if sizes is None or len(set(sizes)) == 1 or case.layout.micro_batch_size is not None:
        return None
    mean = math.fsum(sizes) / len(sizes)
    if case.shown.value < _SLIGHT * max(abs(size / mean - 1) for size in sizes):
        return None
    cause = f"a mean of means: ranks have the weights {few(sizes)}, but count equally"
    return case.finding(str(case), cause)


def _update(case: Case) -> Finding:
    observation = str(case)
    if case.layout.resume_after is not None and case.step == case.layout.resume_after + 1:
        cause = "the optimizer's state was not restored from the checkpoint"
        return case.finding(observation, cause, UPDATE)
    factor = _multiple(*(_moves(each, case.step) for each in (case.reference, case.other)))
    cause = "the optimizer's settings or state depend on the number of processes"
    if factor is not None and abs(factor - 1) > _FACTOR:
        cause = f"parameters change {factor:.6g} times as much for the same gradient: "
        cause += "they are updated more than once, or with a different learning rate"
    return case.finding(observation, cause, UPDATE)


def _buffers(case: Case) -> Finding:
    name, step = case.excess.tensor, case.step
    before, after, actual = (
        case.reference.steps[step - 1].buffers.vectors.get(name),
        case.reference.steps[step].buffers.vectors.get(name),
        case.other.steps[step].buffers.vectors.get(name),
    )
    cause = "each process updates it from its own samples"
    if before is not None and actual is not None and after is not None:
        stale = before.shape == actual.shape and not np.any(before - actual)
        if stale and np.any(after - actual):
            cause = "a stale copy of the buffer is restored after the step"
    return Finding(BUFFERS, f"buffer {name} has a different value", cause, step, name)


def _evaluation(case: Case) -> Finding:
    name = case.excess.what.removeprefix("metric ")
    expected, actual = case.reference.metrics.get(name), case.other.metrics.get(name)
    observation = f"{name} is {actual}, not {expected}, with the same parameters"
    cause = "samples are repeated or dropped to make shares equal, or ranks' means are averaged"
    return Finding(EVALUATION, observation, cause, case.step)


# -- numbers ---------------------------------------------------------------------------------


def _gradients(case: Case) -> tuple[Tensors, Tensors]:
    """Return the reduced gradients of both runs, before clipping."""
    limit = case.spec.train.clip_grad_norm
    expected, actual = (each.steps[case.step] for each in (case.reference, case.other))
    return _before_clipping(expected, limit), _before_clipping(actual, limit)


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


def _side_by_side(expected: Tensors, actual: Tensors) -> tuple[Vector, Vector]:
    names = [
        name
        for name, vector in expected.vectors.items()
        if name in actual.vectors and vector.shape == actual.vectors[name].shape
    ]
    empty: list[Vector] = [np.empty(0)]
    return (
        np.concatenate([*(expected.vectors[name] for name in names), *empty]),
        np.concatenate([*(actual.vectors[name] for name in names), *empty]),
    )


def _moves(recording: Recording, step: int) -> Vector:
    before, after = recording.steps[step - 1].parameters, recording.steps[step].parameters
    old, new = _side_by_side(before, after)
    return new - old


def _multiple(expected: Vector, actual: Vector) -> float | None:
    """Return the factor by which `actual` is a multiple of `expected`; None if it is not."""
    size = float(expected @ expected)
    if expected.shape != actual.shape or size == 0 or not np.all(np.isfinite(actual)):
        return None
    factor = float(expected @ actual) / size
    rest = difference_norm(factor * expected, actual)
    return factor if rest <= _FACTOR * abs(factor) * math.sqrt(size) else None


def _differs(expected: Tensors, actual: Tensors, name: str) -> bool:
    difference = difference_norm(expected.vectors[name], actual.vectors[name])
    return difference > L1.parameters * expected.norm()


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
