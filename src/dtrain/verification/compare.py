"""Measures the difference between two recordings of one training, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.trace import Recording, StepRecord, Tensors, Vector


@dataclass(frozen=True)
class Tolerance:
    """The limits up to which two trainings count as the same: relative 2-norms over all tensors."""

    level: str
    first_gradient: float
    """The limit for all that comes from equal parameters: loss and gradients of the first step."""
    parameters: float
    """The limit for everything after that: parameters, and what is computed from them."""


L1 = Tolerance("L1", first_gradient=1e-12, parameters=1e-10)
"""The limits in fp64."""
L2 = Tolerance("L2", first_gradient=2e-6, parameters=1e-5)
"""The limits in the job's own precision."""

_HIDDEN = 1e-2
_NOISE = 2e-7
"""A difference of a hundredth in one tensor can be lost in the norm of all tensors. Rounding can
cause it too (an attention's key bias has a gradient of 0, so it contains only noise). It is
therefore not a verdict, only a reason to compare in fp64. Below the second figure it is certainly
rounding.
"""


@dataclass(frozen=True)
class Distance:
    relative: float
    """2-norm of the difference / 2-norm of the reference; inf if names or shapes differ."""
    tensor: str
    """The tensor with the largest part of it; empty if all are equal."""
    hidden: float = 0.0
    """The largest difference of one tensor relative to itself, if it is more than noise."""

    @classmethod
    def between(cls, reference: Tensors, other: Tensors) -> Distance:
        """Measure the distance. A name that only one of them has makes it infinite."""
        unmatched = reference.vectors.keys() ^ other.vectors.keys()
        if unmatched:
            return cls(math.inf, min(unmatched))
        parts: dict[str, float] = {}
        hidden = 0.0
        whole = reference.norm()
        for name, vector in reference.vectors.items():
            if reference.digests[name] == other.digests[name]:
                continue
            parts[name] = difference_norm(vector, other.vectors[name])
            if parts[name] > _NOISE * whole:
                hidden = max(hidden, _ratio(parts[name], reference.norms[name]))
        if not parts:
            return cls(0.0, "")
        total = math.sqrt(sum(part * part for part in parts.values()))
        return cls(_ratio(total, whole), max(parts, key=lambda name: parts[name]), hidden)


@dataclass(frozen=True)
class StepDistance:
    step: int
    loss: float
    grad_norm: float
    """The difference of the norms before clipping; 0 without clipping."""
    gradients: Distance
    parameters: Distance
    buffers: Distance

    @property
    def parts(self) -> Mapping[str, Distance]:
        """The quantities that can differ, in the order in which a step computes them."""
        return {
            "loss": Distance(self.loss, ""),
            "gradient norm": Distance(self.grad_norm, ""),
            "gradients": self.gradients,
            "parameters": self.parameters,
            "buffers": self.buffers,
        }


@dataclass(frozen=True)
class Excess:
    """The first quantity whose difference is larger than allowed."""

    step: int
    """The step; for metrics, the last one."""
    what: str
    """`loss`, `gradient norm`, `gradients`, `parameters`, `buffers` or `metric NAME`."""
    tensor: str
    value: float
    """The relative difference."""


@dataclass(frozen=True)
class Comparison:
    steps: list[StepDistance]
    metrics: dict[str, float]
    """The relative difference of each metric of the evaluation at the end."""
    identical: bool
    """True if all parameters and buffers have the same bits after every step."""

    def excess(self, tolerance: Tolerance) -> Excess | None:
        """Return the first difference beyond a tolerance; None if all are within it."""
        for at in self.steps:
            for what, distance in at.parts.items():
                first = at.step == 1 and what in ("loss", "gradient norm", "gradients")
                allowed = tolerance.first_gradient if first else tolerance.parameters
                if distance.relative > allowed:
                    return Excess(at.step, what, distance.tensor, distance.relative)
        for name, value in self.metrics.items():
            if value > tolerance.parameters:
                return Excess(self.steps[-1].step, f"metric {name}", "", value)
        return None

    @property
    def largest(self) -> Excess:
        """Return the largest difference of gradients or parameters, in any step."""
        candidates = [
            Excess(at.step, what, distance.tensor, distance.relative)
            for at in self.steps
            for what, distance in at.parts.items()
            if what in ("gradients", "parameters")
        ]
        return max(candidates, key=lambda each: each.value)

    @property
    def first(self) -> Excess | None:
        """Return the first tensor that differs at all, or else the first number that does."""
        for at in self.steps:
            for what in ("gradients", "parameters", "buffers"):
                distance = at.parts[what]
                if distance.relative > 0:
                    return Excess(at.step, what, distance.tensor, distance.relative)
        return self.excess(Tolerance("", 0.0, 0.0))

    @property
    def suspicious(self) -> bool:
        """True if one tensor differs so much in itself that the norm of all may hide an error."""
        return any(at.gradients.hidden > _HIDDEN for at in self.steps)


def compare(reference: Recording, other: Recording) -> Comparison:
    """Measure the difference of `other` from `reference`, with the same number of steps in both."""
    numbers = range(1, min(reference.last_step, other.last_step) + 1)
    steps = [(reference.steps[number], other.steps[number]) for number in numbers]
    return Comparison(
        steps=[_of_step(*records) for records in steps],
        metrics={
            name: relative(value, other.metrics.get(name, math.inf))
            for name, value in reference.metrics.items()
        },
        identical=all(
            expected.parameters.digests == actual.parameters.digests
            and expected.buffers.digests == actual.buffers.digests
            for expected, actual in steps
        ),
    )


def _of_step(reference: StepRecord, other: StepRecord) -> StepDistance:
    return StepDistance(
        step=reference.step,
        loss=relative(reference.loss, other.loss),
        grad_norm=relative(reference.grad_norm, other.grad_norm),
        gradients=Distance.between(reference.gradients, other.gradients),
        parameters=Distance.between(reference.parameters, other.parameters),
        buffers=Distance.between(reference.buffers, other.buffers),
    )


def relative(reference: float | None, other: float | None) -> float:
    """Return |other - reference| / |reference|; 0 if one of them is unknown, or both are nan."""
    if reference is None or other is None or reference == other:
        return 0.0
    if math.isnan(reference) and math.isnan(other):
        return 0.0
    return _ratio(abs(other - reference), abs(reference))


def difference_norm(reference: Vector, other: Vector) -> float:
    """Return the 2-norm of the difference; inf if the shapes differ, or one is not finite."""
    if reference.shape != other.shape:
        return math.inf
    difference = _norm(other - reference)
    return difference if math.isfinite(difference) else math.inf


def _norm(vector: Vector) -> float:
    return math.sqrt(float(vector @ vector))


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    ratio = difference / size if size > 0 else math.inf
    return math.inf if math.isnan(ratio) else ratio
