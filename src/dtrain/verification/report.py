"""The result of a whole `dtrain verify`, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dtrain.trace import Recording
from dtrain.verification.compare import Excess
from dtrain.verification.judge import Result


@dataclass
class Report:
    job: str
    """The job's name."""
    steps: int
    """Optimizer steps of each run."""
    samples: int | None
    """Samples of an epoch of these runs. None means a stream, whose length is unknown."""
    reference: str
    """The layout with which all others are compared."""
    recording: Recording
    """The recording of the reference."""
    results: list[Result] = field(default_factory=list)
    deep: bool = False
    """True if everything ran in fp64."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Additional layouts, which the user did not request and this job cannot run: name → reason."""

    @property
    def same(self) -> bool:
        """True if every layout is the same training."""
        return all(result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints. Differences that are infinite or unknown are null."""
        return {
            "job": self.job,
            "steps": self.steps,
            "deep": self.deep,
            "samples_per_epoch": self.samples,
            "same": self.same,
            "reference": {"layout": self.reference, "loss": losses(self.recording)},
            "layouts": [_row(result) for result in self.results],
            "left_out": [{"layout": name, "why": why} for name, why in self.left_out.items()],
        }


def losses(recording: Recording | None) -> list[float | None]:
    """Return the loss of each step, as the trainer reported it."""
    if recording is None:
        return []
    return [_finite(record.loss) for step, record in sorted(recording.steps.items()) if step]


def _row(result: Result) -> dict[str, Any]:
    layout = result.layout
    return {
        "layout": layout.name,
        "trainer": layout.trainer,
        "strategy": layout.strategy,
        "own_loops": layout.own_loops,
        "launcher": layout.launcher,
        "nodes": layout.nodes,
        "procs": layout.procs,
        "verdict": result.verdict,
        "level": result.level,
        "largest_difference": _excess(result.largest),
        "first_difference": _excess(result.first),
        "shrinks_in_fp64": _finite(result.shrinks),
        "fixed_noise": result.fixed_noise,
        "draws": list(result.draws),
        "same_bits_as": result.bits_of or None,
        "code": result.code or None,
        "finding": None if result.finding is None else asdict(result.finding),
        "failure": result.failure or None,
        "loss": losses(result.recording),
    }


def _excess(excess: Excess | None) -> dict[str, Any] | None:
    if excess is None:
        return None
    return {**asdict(excess), "value": _finite(excess.value)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
