"""What is known of a run now. It reads only what is new in the run's files."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dtrain.console.tail import Follower
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import status
from dtrain.plainjson import numbers
from dtrain.run import files
from dtrain.run.attempts import Handle, State
from dtrain.run.events import resumed_step
from dtrain.run.failures import first_cause
from dtrain.run.phases import OWN, straggler
from dtrain.run.progress import NOT_METRICS
from dtrain.run.remote.runs import refresher
from dtrain.run.rundir import RunDir

_STATE_S = 2.0
"""The time between two looks at the state, which may ask a cluster."""
_RECENT = 200
"""The number of lines of metrics that the present speed is computed from."""
_MOST_POINTS = 2000
_LOG_BYTES = 256 << 10
"""How much of the end of a log is searched for warnings at first."""
_MOST_LOGS = 64
"""The most ranks whose logs are searched for warnings; all ranks mostly warn of the same."""
_WARNING = re.compile(r"^(?:\d{4}-\d\d-\d\d \S+ )?((?:WARNING|ERROR|CRITICAL) .*|.*Warning: .*)")


@dataclass
class RankNow:
    """What a rank did in its newest record of phases."""

    rank: int
    node_rank: int
    time: float
    steps: int
    phases: dict[str, float]

    @property
    def own_seconds(self) -> float | None:
        """Return how long its own part of a step took, without waiting for other ranks."""
        own = sum(self.phases.get(phase, 0.0) for phase in OWN)
        return own / self.steps if self.steps else None


@dataclass
class Watch:
    """A run, as far as it is known. `update` reads what is new."""

    run: RunDir
    state: State = "prepared"
    step: int = 0
    total_steps: int | None = None
    metrics: dict[tuple[str, str], deque[tuple[int, float]]] = field(default_factory=dict)
    """(split, metric) → (step, value), the newest at the end."""
    ranks: dict[int, RankNow] = field(default_factory=dict)
    nodes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """node rank → the newest record of `dtrain.node.usage`."""
    checkpoint: tuple[str, float] | None = None
    """The name of the newest checkpoint, and when it was complete."""
    warnings: dict[str, set[int]] = field(default_factory=dict)
    """The text of a warning → the ranks that logged it."""
    started: float | None = None

    def __post_init__(self) -> None:
        self.plan = LaunchPlan.read(self.run)
        self._refresh = refresher(self.run)
        self._follower: Follower[tuple[str, int, int]] = Follower()
        self._follower.add(("events", 0, 0), self.run.events)
        self._follower.add(("metrics", 0, 0), self.run.metrics)
        self._known: set[tuple[str, int, int, int]] = set()
        self._failures: dict[tuple[int, int], list[dict[str, Any]]] = {}
        """(attempt, restart) → the failures that its nodes have reported."""
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._looked_at = 0.0

    def update(self) -> None:
        """Read what is new."""
        self._refresh()
        if time.monotonic() - self._looked_at > _STATE_S:
            self.state = status.state_of(self.run)[0]
            self._looked_at = time.monotonic()
        self._find_files()
        for (kind, owner, node_rank), line in self._follower.poll():
            if kind == "log":
                self._warn(owner, line)
            elif (record := files.parse_line(line)) and isinstance(record.get("time"), int | float):
                self._take(kind, owner, node_rank, record)

    @property
    def attempt(self) -> int:
        return max(self.run.attempts(), default=self.plan.attempt)

    @property
    def failures(self) -> list[str]:
        """Return a text about the cause of each failure of workers, the newest at the end."""
        causes = [first_cause(each) for each in self._failures.values()]
        return [f"rank {c.get('rank')} on {c.get('node')}: {_first_line(c)}" for c in causes]

    def eta(self, now: float) -> tuple[float, float] | None:
        """Return the seconds to the last step: at the present speed, and at that of the whole run.

        The second includes restarts, queues and stops as often as they came until now.
        """
        if self.total_steps is None or len(self._marks) < 2 or self.started is None:
            return None
        (first, begun), (last, done) = self._marks[0], self._marks[-1]
        if done <= begun or not self.step:
            return None
        left = max(0, self.total_steps - self.step)
        present = (last - first) / (done - begun)
        return left * present, left * max(present, (now - self.started) / self.step)

    def straggler(self) -> tuple[int, float] | None:
        """Return the slowest rank and how many times the median it takes, if that is much."""
        known = {r: own for r, each in self.ranks.items() if (own := each.own_seconds) is not None}
        return None if self.plan.strategy == "fsdp" else straggler(known)

    def to_json(self) -> dict[str, Any]:
        """Return what `dtrain top --json` prints."""
        eta = self.eta(time.time())
        return {
            "id": self.run.id,
            "state": self.state,
            "attempt": self.attempt,
            "step": self.step,
            "total_steps": self.total_steps,
            "eta_seconds": None if eta is None else round(eta[0], 3),
            "eta_seconds_with_restarts": None if eta is None else round(eta[1], 3),
            "metrics": {f"{s}/{name}": v[-1][1] for (s, name), v in self.metrics.items() if v},
            "ranks": {
                str(rank): {"node_rank": each.node_rank, "steps": each.steps, **each.phases}
                for rank, each in sorted(self.ranks.items())
            },
            "straggler": None if (slow := self.straggler()) is None else slow[0],
            "nodes": {str(node_rank): each for node_rank, each in sorted(self.nodes.items())},
            "checkpoint": None if self.checkpoint is None else self.checkpoint[0],
            "failures": self.failures,
            "warnings": {text: sorted(ranks) for text, ranks in self.warnings.items()},
        }

    def _find_files(self) -> None:
        """Follow the files of the newest attempt, which may be a new one."""
        attempt = self.attempt
        if self.started is None and (handle := Handle.read(self.run, 0)) is not None:
            self.started = handle.started
        for path in self.run.attempt(attempt).glob("node-*/*"):
            node_rank, name = path.parent.name.removeprefix("node-"), path.name
            if not node_rank.isdecimal():
                continue
            rank = name.removeprefix("rank-").partition(".")[0]
            owner = int(rank) if rank.isdecimal() else int(node_rank)
            kind = {"jsonl": "usage", "phases.jsonl": "phases", "log": "log"}.get(
                name.partition(".")[2], ""
            )
            is_log = kind == "log" and rank.isdecimal() and owner < _MOST_LOGS
            key = (kind, attempt, owner, int(node_rank))
            if (is_log or kind in ("usage", "phases")) and key not in self._known:
                self._known.add(key)
                start = max(0, path.stat().st_size - _LOG_BYTES) if is_log else 0
                self._follower.add((kind, owner, int(node_rank)), path, start)

    def _take(self, kind: str, owner: int, node_rank: int, record: dict[str, Any]) -> None:
        if kind == "events":
            self._event(record)
        elif kind == "metrics":
            self._metrics(record)
        elif kind == "usage":
            self.nodes[node_rank] = record
        elif isinstance(record.get("phases"), dict) and isinstance(record.get("steps"), int):
            phases = numbers(record["phases"])
            self.ranks[owner] = RankNow(owner, node_rank, record["time"], record["steps"], phases)

    def _event(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "training_started":
            total = event.get("total_steps")
            self.total_steps = total if isinstance(total, int) else None
            self.step = resumed_step(event)
            self._marks.clear()
            self.ranks.clear()
            for values in self.metrics.values():
                while values and values[-1][0] > self.step:
                    values.pop()
        elif kind == "checkpoint_saved":
            self.checkpoint = str(event.get("checkpoint")), event["time"]
        elif kind == "worker_failed" and isinstance(event.get("what"), str):
            key = self.attempt, event.get("restart", 0)
            self._failures.setdefault(key, []).append(event)

    def _metrics(self, line: dict[str, Any]) -> None:
        step, split = line.get("step"), line.get("split")
        if not isinstance(step, int):
            return
        if split == "train":
            self.step = step
            self._marks.append((line["time"], step))
        for name, value in numbers(line).items():
            if name not in NOT_METRICS:
                values = self.metrics.setdefault((str(split), name), deque())
                values.append((step, value))
                if len(values) > _MOST_POINTS:
                    self.metrics[str(split), name] = deque([*values][::2])

    def _warn(self, rank: int, line: str) -> None:
        found = _WARNING.match(line)
        if found is not None:
            self.warnings.setdefault(found[1], set()).add(rank)


def _first_line(event: dict[str, Any]) -> str:
    return str(event["what"]).partition("\n")[0]


def last_lines(watch: Watch, rank: int, count: int) -> list[str]:
    """Return the last lines of a rank's log."""
    logs = watch.run.rank_logs(watch.attempt)
    if rank not in logs or count < 1:
        return []
    path = logs[rank][1]
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace").splitlines()[-count:]


def shown_metrics(watch: Watch) -> Iterator[tuple[str, str, deque[tuple[int, float]]]]:
    """Yield the metrics to show, the loss first: split, name and values."""
    order = sorted(watch.metrics, key=lambda key: (key[0] != "train", key[1] != "loss"))
    for split, name in order:
        if watch.metrics[split, name]:
            yield split, name, watch.metrics[split, name]
