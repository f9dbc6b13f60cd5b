"""A pair of trainings that differ, as the search for the cause receives it."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.job.spec import JobSpec
from dtrain.trace import Recording
from dtrain.verification.clauses import GRADIENT, Finding
from dtrain.verification.compare import Distance, Excess
from dtrain.verification.pairs import Pair


@dataclass(frozen=True)
class Case:
    """A pair that differs from the reference, and the first difference."""

    reference: Recording
    other: Recording
    pair: Pair
    spec: JobSpec
    excess: Excess

    @property
    def step(self) -> int:
        return self.excess.step

    @property
    def shown(self) -> Excess:
        """Return the difference to report: for a loss or a gradient norm, that of the gradients."""
        if self.excess.what not in ("loss", "gradient norm"):
            return self.excess
        ours, theirs = (each.steps[self.step].gradients for each in (self.reference, self.other))
        distance = Distance.between(ours, theirs)
        return Excess(self.step, "gradients", distance.tensor, distance.relative)

    def __str__(self) -> str:
        """Return for example `the gradients are off by 1.2e-02, most of it in first.weight`."""
        where = f", most of it in {self.shown.tensor}" if self.shown.tensor else ""
        return f"the {self.shown.what} are off by {self.shown.value:.1e}{where}"

    def finding(self, found: str, likely: str, clause: str = GRADIENT) -> Finding:
        """Return a finding about this pair."""
        return Finding(clause, found, likely, self.step, self.shown.tensor)
