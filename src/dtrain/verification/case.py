"""A training that differs from the reference, as the search for the cause receives it."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.job.spec import JobSpec
from dtrain.trace import Recording
from dtrain.verification.compare import Distance, Excess
from dtrain.verification.layouts import Layout
from dtrain.verification.rules import GRADIENT, Finding


@dataclass(frozen=True)
class Case:
    """A layout that differs from the reference, and the first difference."""

    reference: Recording
    other: Recording
    layout: Layout
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
        expected, actual = (
            each.steps[self.step].gradients for each in (self.reference, self.other)
        )
        distance = Distance.between(expected, actual)
        return Excess(self.step, "gradients", distance.tensor, distance.relative)

    def __str__(self) -> str:
        """Return a sentence about the size of the difference and its largest part."""
        where = f", mostly in {self.shown.tensor}" if self.shown.tensor else ""
        return f"the relative difference of the {self.shown.what} is {self.shown.value:.1e}{where}"

    def finding(self, observation: str, cause: str, rule: str = GRADIENT) -> Finding:
        """Return a finding about this layout."""
        return Finding(rule, observation, cause, self.step, self.shown.tensor)
