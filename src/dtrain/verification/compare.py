"""How far two recordings of one training lie apart, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.trace import Recording, StepRecord, Tensors, Vector


@dataclass(frozen=True)
class Tolerance:
    """Up to where two trainings count as the same; relative 2-norms over all tensors."""

    level: str
    first_gradient: float
    """Of everything computed from equal parameters: loss and gradients of the first step."""
    parameters: float
    """Of everything after it: parameters, and what is computed from them."""


L1 = Tolerance("L1", first_gradient=1e-12, parameters=1e-10)
"""In fp64."""
L2 = Tolerance("L2", first_gradient=2e-6, parameters=1e-5)
"""In the job's own precision."""

_HIDDEN = 1e-2
_NOISE = 2e-7
"""A tensor that differs by a hundredth of itself may be lost in the norm of all tensors. Rounding
can do that too (an attention's key bias has a gradient of 0: it is all noise), so it is no
verdict, only a reason to look in fp64; below the second figure it is rounding for certain."""


@dataclass(frozen=True)
class Distance:
    relative: float
    """2-norm of the difference / 2-norm of the reference; inf where names or shapes differ."""
    tensor: str
    """The one with the largest share of it; empty when all are equal."""
    hidden: float = 0.0
    """The largest difference of one tensor relative to itself, where it is more than noise."""

    @classmethod
    def between(cls, reference: Tensors, other: Tensors) -> Distance:
        """Measure; names that only one side has are infinitely far."""
        strangers = reference.vectors.keys() ^ other.vectors.keys()
        if strangers:
            return cls(math.inf, min(strangers))
        parts: dict[str, float] = {}
        hidden = 0.0
        whole = reference.norm()
        for name, vector in reference.vectors.items():
            if reference.digests[name] == other.digests[name]:
                continue
            parts[name] = apart(vector, other.vectors[name])
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
    """Before clipping; 0 without clipping."""
    gradients: Distance
    parameters: Distance
    buffers: Distance

    @property
    def parts(self) -> Mapping[str, Distance]:
        """What can differ, in the order in which a step computes it."""
        return {
            "loss": Distance(self.loss, ""),
            "gradient norm": Distance(self.grad_norm, ""),
            "gradients": self.gradients,
            "parameters": self.parameters,
            "buffers": self.buffers,
        }


@dataclass(frozen=True)
class Excess:
    """The first thing that lies further apart than it may."""

    step: int
    """Of the metrics: the last."""
    what: str
    """`loss`, `gradient norm`, `gradients`, `parameters`, `buffers` or `metric NAME`."""
    tensor: str
    value: float
    """Relative difference."""


@dataclass(frozen=True)
class Comparison:
    steps: list[StepDistance]
    metrics: dict[str, float]
    """Relative difference of each metric of the evaluation at the end."""
    identical: bool
    """Whether all parameters and buffers have the same bits after every step."""

    def excess(self, tolerance: Tolerance) -> Excess | None:
        """The first thing beyond a tolerance; None when all is within it."""
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
        """The largest difference of gradients or parameters, wherever it is."""
        candidates = [
            Excess(at.step, what, distance.tensor, distance.relative)
            for at in self.steps
            for what, distance in at.parts.items()
            if what in ("gradients", "parameters")
        ]
        return max(candidates, key=lambda each: each.value)

    @property
    def first(self) -> Excess | None:
        """The first tensor that differs at all, or where none does, the first number."""
        for at in self.steps:
            for what in ("gradients", "parameters", "buffers"):
                distance = at.parts[what]
                if distance.relative > 0:
                    return Excess(at.step, what, distance.tensor, distance.relative)
        return self.excess(Tolerance("", 0.0, 0.0))

    @property
    def suspicious(self) -> bool:
        """Whether some tensor differs so much in itself that the norm of all may hide a fault."""
        return any(at.gradients.hidden > _HIDDEN for at in self.steps)


def compare(reference: Recording, other: Recording) -> Comparison:
    """Measure how far `other` lies from `reference`; both recorded the same number of steps."""
    numbers = range(1, min(reference.last_step, other.last_step) + 1)
    pairs = [(reference.steps[number], other.steps[number]) for number in numbers]
    return Comparison(
        steps=[_of_step(*pair) for pair in pairs],
        metrics={
            name: relative(value, other.metrics.get(name, math.inf))
            for name, value in reference.metrics.items()
        },
        identical=all(
            ours.parameters.digests == theirs.parameters.digests
            and ours.buffers.digests == theirs.buffers.digests
            for ours, theirs in pairs
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
    """|other - reference| / |reference|; 0 where one of them is not known, or both are nan."""
    if reference is None or other is None or reference == other:
        return 0.0
    if math.isnan(reference) and math.isnan(other):
        return 0.0
    return _ratio(abs(other - reference), abs(reference))


def apart(reference: Vector, other: Vector) -> float:
    """2-norm of the difference; inf where shapes differ, or one is not finite."""
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
