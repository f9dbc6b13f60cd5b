"""The progress of a run, from the files of its ranks: steps, metrics, and the expected end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dtrain.run import files
from dtrain.run.rundir import RunDir

_STEPS_DONE = {
    "training_started": "resumed_from",
    "resumed": "step",
    "checkpoint_saved": "step",
    "step_skipped": "step",
    "stopped": "step",
    "finished": "steps",
}
"""Events of a training, and the field of each that has the number of optimizer steps done."""
_SPLITS = ("train", "eval", "validate", "test")
_RECENT_BYTES = 1 << 20
NOT_METRICS = ("time", "step", "epoch", "split")
"""The fields that every line of metrics.jsonl has."""


@dataclass
class Progress:
    step: int | None = None
    """The number of optimizer steps done, as far as it is known."""
    total_steps: int | None = None
    """None where it is not known, for example for a stream."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest value of each metric, by split."""
    checkpoint: str | None = None
    """The name of the newest checkpoint."""
    updated: float | None = None
    """The time of the newest of these records, in seconds since the epoch."""
    seconds_per_step: float | None = None
    """Includes evaluations and checkpoints. None before the second line of metrics."""

    @property
    def percent(self) -> int | None:
        """Return the share of steps that are done, in percent, rounded down."""
        if self.step is None or not self.total_steps:
            return None
        return min(100, 100 * self.step // self.total_steps)

    @property
    def end(self) -> float | None:
        """Return when the last step will be done at this rate, in seconds since the epoch."""
        known = (self.step, self.total_steps, self.updated, self.seconds_per_step)
        if any(each is None for each in known):
            return None
        assert self.step is not None
        assert self.total_steps is not None
        assert self.updated is not None
        assert self.seconds_per_step is not None
        return self.updated + max(0, self.total_steps - self.step) * self.seconds_per_step

    @classmethod
    def read(cls, run: RunDir, *, recent: bool = False) -> Progress:
        """Read the progress over all attempts.

        Steps trained twice count once, with the newest values.

        Args:
            run: the run.
            recent: whether to parse only the newest MiB of metrics, and of earlier ones the newest
                line of each split that has none there.
        """
        found = cls()
        first: tuple[float, int] | None = None
        for time, record in sorted(_records(run, recent), key=lambda each: each[0]):
            if "split" in record:
                found._take_metrics(record)
                done = record["step"]
                if record["split"] == "train":
                    first = first or (time, done)
            else:
                done = found._take_event(record)
                if record["event"] == "training_started":
                    first = None
            if isinstance(done, int):
                found.step, found.updated = done, time
                if first is not None and done > first[1]:
                    found.seconds_per_step = (time - first[0]) / (done - first[1])
        return found

    def _take_metrics(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name not in NOT_METRICS}
        self.metrics.setdefault(line["split"], {}).update(values)

    def _take_event(self, event: dict[str, Any]) -> Any:
        """Return the number of steps done according to an event. None if it has no such number."""
        if event["event"] == "training_started":
            total = event.get("total_steps")
            self.total_steps = total if isinstance(total, int) else None
            self.seconds_per_step = None
        if isinstance(event.get("checkpoint"), str):
            self.checkpoint = event["checkpoint"]
        return event.get(_STEPS_DONE[event["event"]])


def _records(run: RunDir, recent: bool) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield events and metrics with their times.

    Records of one file with equal times keep their order.
    """
    for event in files.read_lines(run.events, event=str, time=float):
        if event["event"] in _STEPS_DONE:
            yield event["time"], event
    fields: dict[str, type] = {"split": str, "step": int, "time": float}
    if not recent:
        lines = files.read_lines(run.metrics, **fields)
    else:
        marks = [f'"split": "{split}"'.encode() for split in _SPLITS]
        lines = files.read_newest_lines(run.metrics, _RECENT_BYTES, marks, **fields)
    for line in lines:
        yield line["time"], line
