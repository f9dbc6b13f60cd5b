"""Which checkpoints of a run are kept when a newer one is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dtrain.job.spec import CheckpointSpec

SCORE, PIN = "score.json", "pinned.json"
"""The files that mark a checkpoint, in its directory. They are not part of it."""


@dataclass(frozen=True)
class Marks:
    """What is recorded of a checkpoint beside its content."""

    pinned: bool = False
    """Whether somebody asked to keep it."""
    score: tuple[str, float] | None = None
    """The name and the value of the metric for which it was kept as one of the best."""


@dataclass(frozen=True)
class Retention:
    """How many checkpoints are kept. Pinned ones are kept in addition.

    Args:
        newest: the number of newest ones.
        best: the number of those with the best values of a metric.
        metric: the name of the metric.
        mode: `min` if smaller values are better, `max` if larger ones are.
    """

    newest: int
    best: int = 0
    metric: str = ""
    mode: Literal["min", "max"] = "min"

    @classmethod
    def of(cls, spec: CheckpointSpec) -> Retention:
        """Return what a job says."""
        best = spec.best
        if best is None:
            return cls(spec.keep)
        # one is kept as `best`, which at a URL is a copy
        return cls(spec.keep, 0 if best.keep == 1 else best.keep, best.metric, best.mode)

    def kept(self, newest_first: Sequence[str], marks: Mapping[str, Marks]) -> dict[str, str]:
        """Return the names of the checkpoints that are kept, each with the reason.

        If there are several, it is the one that lasts longest.

        Args:
            newest_first: the names of all checkpoints.
            marks: the marks of those that have any.
        """
        scores = {
            name: mark.score[1]
            for name, mark in marks.items()
            if name in newest_first and mark.score is not None and mark.score[0] == self.metric
        }
        best_first = sorted(scores, key=scores.__getitem__, reverse=self.mode == "max")
        reasons = dict.fromkeys(newest_first[: self.newest], "newest")
        reasons |= dict.fromkeys(best_first[: self.best], "best")
        reasons |= {name: "pinned" for name in newest_first if marks.get(name, Marks()).pinned}
        return reasons


def read_score(text: bytes) -> tuple[str, float] | None:
    """Return the metric and its value in a file of a score; None if it is damaged."""
    try:
        found = json.loads(text)
        return str(found["metric"]), float(found["value"])
    except (KeyError, TypeError, ValueError):
        return None
