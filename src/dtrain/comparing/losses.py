"""The step at which the training losses of two runs part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.run import files
from dtrain.run.rundir import RunDir

ROUNDING = 1e-6
"""The largest relative difference that counts as rounding in fp32."""


@dataclass(frozen=True)
class Difference:
    """The losses of one step, which differ."""

    step: int
    losses: tuple[float, float]
    relative: float
    """The difference as a fraction of the larger one; infinite if only one is finite."""


@dataclass(frozen=True)
class Parting:
    """How the training losses of a run differ from those of the first one."""

    run: str
    """The id of the run."""
    steps: int
    """The number of steps for which both have logged a loss."""
    last: int | None
    """The last of these steps. None if there is none."""
    first: Difference | None
    """The first step whose losses are not the same bits."""
    beyond_rounding: Difference | None
    """The first step whose losses differ by more than a relative 1e-6."""


def losses_of(run: RunDir) -> dict[int, float]:
    """Return the training loss of each logged step. Of a step trained twice, it is the newest."""
    lines = files.read_lines(run.metrics, split=str, step=int)
    found = {line["step"]: line.get("loss", "") for line in lines if line["split"] == "train"}
    known = {step: math.nan if loss is None else loss for step, loss in found.items()}
    return {step: float(loss) for step, loss in known.items() if isinstance(loss, int | float)}


def parting(run: str, first: dict[int, float], other: dict[int, float]) -> Parting:
    """Compare the losses of two runs in the steps that both have.

    Args:
        run: the id of the other run.
        first: the losses of the first run by step.
        other: those of the other run.
    """
    steps = sorted(first.keys() & other.keys())
    pairs = ((step, (first[step], other[step])) for step in steps)
    found = [
        Difference(step, losses, _relative(*losses)) for step, losses in pairs if _differ(*losses)
    ]
    beyond = next((each for each in found if each.relative > ROUNDING), None)
    last = steps[-1] if steps else None
    return Parting(run, len(steps), last, found[0] if found else None, beyond)


def _differ(one: float, other: float) -> bool:
    return one != other and not (math.isnan(one) and math.isnan(other))


def _relative(one: float, other: float) -> float:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))
