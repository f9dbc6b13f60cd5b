"""The course of one run: its metrics, its phases and what it used, over all attempts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from dtrain.environ import shown
from dtrain.launchers import summary
from dtrain.launchers.summary import judged
from dtrain.plainjson import numbers
from dtrain.report.phase_grid import PhaseGrid
from dtrain.report.timeline import Timeline, read_timeline
from dtrain.run import files, verdict
from dtrain.run.events import resumed_step
from dtrain.run.phases import read_phases, read_usage
from dtrain.run.progress import NOT_METRICS
from dtrain.run.rundir import RunDir
from dtrain.run.step_profile import StepProfile, read_step_profiles

_USAGE_PARTS = 200

Series = dict[tuple[str, str], dict[int, float]]
"""(split, metric) → step → value."""


@dataclass
class History:
    """The course of a run. Steps that were trained again have their last values."""

    summary: dict[str, Any]
    """What `dtrain status --json` prints."""
    job: dict[str, Any]
    """The resolved job. Values that may be secrets are masked."""
    series: Series
    timeline: Timeline
    phases: PhaseGrid
    usage: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """What was used over time, as (seconds since the start, value)."""
    verdicts: list[tuple[int, str]] = field(default_factory=list)
    """The attempts that failed, with the text of `dtrain why`."""
    profiles: list[StepProfile] = field(default_factory=list)
    """What `--profile` has recorded."""

    @property
    def id(self) -> str:
        return str(self.summary["id"])

    @property
    def label(self) -> str:
        """The id, and for a run of a sweep its values."""
        values = self.summary.get("sweep_values") or {}
        listed = ", ".join(f"{field}={value}" for field, value in values.items())
        return f"{self.id} ({listed})" if listed else self.id

    def shares(self) -> dict[str, float]:
        """Return what the wall time went to, in seconds.

        `steps` is the time of the steps that count, without evaluations and checkpoints, in which
        training stands still.
        """
        spent: dict[str, float] = dict(self.timeline.seconds.items())
        training = spent.pop("training")
        rank0 = self.phases.rank_seconds(0)
        apart = {name: rank0.get(name, 0.0) for name in ("evaluation", "checkpoint")}
        scale = min(1.0, training / max(sum(apart.values()), 1e-9))
        apart = {name: scale * seconds for name, seconds in apart.items()}
        return {"steps": training - sum(apart.values()), **apart, **spent}

    def goodput(self) -> float | None:
        """Return the share of the wall time that trained steps which count."""
        wall = self.timeline.end - self.timeline.start
        return self.shares()["steps"] / wall if wall > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return what `dtrain report --json` prints."""
        return {
            **self.summary,
            "goodput": self.goodput(),
            "seconds": {name: round(value, 3) for name, value in self.shares().items()},
            "phases": self.phases.to_json(),
            "failed_attempts": [attempt for attempt, _ in self.verdicts],
            "profiles": [asdict(each) for each in self.profiles],
        }


def read(run: RunDir) -> History:
    """Read the course of a run.

    Raises:
        DamagedError: a file of the run cannot be read.
    """
    row = summary.summary(run)
    rollbacks = [
        (event["time"], resumed_step(event))
        for event in files.read_lines(run.events, event=str, time=float)
        if event["event"] == "training_started"
    ]
    steps: list[tuple[float, int]] = []
    series = _series(run, rollbacks, steps)
    attempts = run.attempts()
    timeline = read_timeline(run, steps, running=row["state"] == "running")
    grid = PhaseGrid(*timeline.training)
    for attempt in attempts:
        for rank, line in read_phases(run, attempt):
            grid.add(rank, line)
    return History(
        summary=row,
        job=_job(run),
        series=series,
        timeline=timeline,
        phases=grid,
        usage=_usage(run, timeline.start, timeline.end),
        verdicts=list(_verdicts(run)),
        profiles=list(read_step_profiles(run)),
    )


def _series(
    run: RunDir, rollbacks: list[tuple[float, int]], steps: list[tuple[float, int]]
) -> Series:
    """Return the metrics by step, and append when each step of a line was done to `steps`."""
    found: Series = {}
    left = sorted(rollbacks, reverse=True)
    for line in files.read_lines(run.metrics, split=str, step=int, time=float):
        step, split = line["step"], line["split"]
        while left and left[-1][0] <= line["time"]:
            _, resumed = left.pop()
            for values in found.values():
                while values and next(reversed(values)) > resumed:
                    values.popitem()
        if split == "train":
            steps.append((line["time"], step))
        for name, value in numbers(line).items():
            if name not in NOT_METRICS:
                found.setdefault((split, name), {})[step] = value
    return found


def _usage(run: RunDir, start: float, end: float) -> dict[str, list[tuple[float, float]]]:
    """Return what all nodes together used, or the fullest of them, in parts of the time.

    Nodes write their records at different times, so each part has the last one of each node.
    """
    width = max(1.0, (end - start) / _USAGE_PARTS)
    last: dict[tuple[str, int], dict[int, float]] = {}
    for attempt in run.attempts():
        for node_rank, line in read_usage(run, attempt):
            part = int((line["time"] - start) / width)
            for name, value in _readings(line):
                last.setdefault((name, part), {})[node_rank] = value
    found: dict[str, list[tuple[float, float]]] = {}
    for (name, part), values in sorted(last.items()):
        total = sum(values.values()) if name in (_CORES, _POWER) else max(values.values())
        found.setdefault(name, []).append((round((part + 0.5) * width, 1), total))
    return found


_CORES, _MEMORY = "cores in use, all nodes", "memory in use, fullest node (%)"
_GPU, _GPU_MEMORY = "GPU utilization, busiest node (%)", "GPU memory, fullest GPU (%)"
_POWER = "power of the GPUs, all nodes (W)"


def _readings(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the names and values of one record of a node."""
    ranks, gpus = line.get("ranks"), line.get("gpus")
    if isinstance(ranks, dict):
        yield _CORES, sum(cores for cores, _ in ranks.values())
    if line.get("memory_total"):
        yield _MEMORY, 100 * line["memory_used"] / line["memory_total"]
    if isinstance(gpus, list) and gpus:
        known = [gpu["utilization"] for gpu in gpus if "utilization" in gpu]
        if known:
            yield _GPU, sum(known) / len(known)
        full = [gpu["memory_used"] / gpu["memory_total"] for gpu in gpus if gpu.get("memory_total")]
        if full:
            yield _GPU_MEMORY, 100 * max(full)
        power = [gpu["power"] for gpu in gpus if "power" in gpu]
        if power:
            yield _POWER, sum(power)


def _verdicts(run: RunDir) -> Iterator[tuple[int, str]]:
    for attempt in run.attempts():
        number, _, failed = judged(run, attempt)
        if failed is not None:
            yield number, verdict.render(failed, run, 100, lambda text, colour: text)


def _job(run: RunDir) -> dict[str, Any]:
    text = files.read_text(run.resolved) or "{}"
    job = yaml.safe_load(text)
    masked = shown("", job) if isinstance(job, dict) else {}
    return masked if isinstance(masked, dict) else {}
