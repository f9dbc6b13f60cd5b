"""What a run did when, over all its attempts and restarts, and how much of it was training."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from dtrain.run import files
from dtrain.run.attempts import Handle, Result
from dtrain.run.events import resumed_step
from dtrain.run.rundir import RunDir

Kind = Literal["training", "repeated", "starting", "queued", "stopped"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_TEXTS: dict[Kind, str] = {
    "training": "training",
    "repeated": "steps that were lost and trained again",
    "starting": "starting, restarting and ending",
    "queued": "waiting in the queue",
    "stopped": "not running",
}
_LISTED = {
    "attempt_started": "attempt {attempt} started",
    "checkpoint_saved": "checkpoint of step {step}",
    "checkpoint_failed": "the checkpoint of step {step} failed: {detail}",
    "ended": "{state}, exit code {exit_code}",
    "finished": "finished after step {steps}",
    "profiled": "profile of steps {first}-{last} of rank {rank}",
    "resumed": "resumed from step {step}",
    "stopped": "stopped after step {step}: {reason}",
    "submitted": "submitted as job {job_id}",
    "training_started": "training started with {world_size} ranks",
    "worker_failed": "rank {rank} failed: {what}",
}
"""The events that a time line shows, and their texts, with fields of the event."""


@dataclass(frozen=True)
class Span:
    kind: Kind
    start: float
    """In seconds since the epoch, like `end`."""
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Event:
    time: float
    event: str
    """The kind of event in events.jsonl."""
    text: str


@dataclass
class Timeline:
    spans: list[Span] = field(default_factory=list)
    """What the run did, without gaps, in the order of time."""
    events: list[Event] = field(default_factory=list)

    @property
    def start(self) -> float:
        return self.spans[0].start if self.spans else 0.0

    @property
    def end(self) -> float:
        return self.spans[-1].end if self.spans else 0.0

    @property
    def training(self) -> tuple[float, float]:
        """Return when training began and ended, in seconds since the epoch."""
        spans = [span for span in self.spans if span.kind in ("training", "repeated")]
        return (spans[0].start, spans[-1].end) if spans else (self.start, self.end)

    @property
    def seconds(self) -> dict[Kind, float]:
        """Return how long the run did each kind of thing, in seconds."""
        return {k: sum(span.seconds for span in self.spans if span.kind == k) for k in KINDS}


def read_timeline(run: RunDir, steps: Iterable[tuple[float, int]], *, running: bool) -> Timeline:
    """Read what a run did when.

    Args:
        run: the run.
        steps: times at which a number of steps was done, in the order of time.
        running: whether it still runs.
    """
    records = [(e["time"], e) for e in files.read_lines(run.events, event=str, time=float)]
    for attempt in run.attempts():
        handle, result = Handle.read(run, attempt), Result.read(run, attempt)
        if handle is not None:
            again = handle.first < attempt
            records.append((handle.started, {"event": "claimed", "again": again}))
        if result is not None:
            records.append((result.ended, {"event": "attempt_ended"}))
    records.sort(key=lambda each: each[0])
    line = _Sweep(has_training=any(e["event"] == "training_started" for _, e in records))
    for when, event in records:
        line.take(when, event)
    now = time.time() if running else max([when for when, _ in records], default=0.0)
    spans = line.finish(now)
    return Timeline(_with_repeated(spans, line.resumed, list(steps)), _events(records))


class _Sweep:
    """Turns events, in the order of time, into spans."""

    def __init__(self, *, has_training: bool) -> None:
        self._starts_with = "training_started" if has_training else "workers_started"
        """The event with which training begins. A script has no other than its start."""
        self._spans: list[Span] = []
        self._kind: Kind | None = None
        self._since = 0.0
        self.resumed: list[tuple[float, int]] = []
        """When each training began, and from which step."""

    def take(self, when: float, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "claimed" and event["again"] and self._kind == "starting":
            self._kind = "queued"  # the batch job was put back into the queue
        if kind == "attempt_ended":
            self._switch("stopped", when)
        elif kind == "submitted":
            self._switch("queued", when)
        elif kind == self._starts_with:
            if self._kind != "training" or kind == "training_started":
                self.resumed.append((when, resumed_step(event)))
                self._switch("training", when)
        elif kind in ("claimed", "attempt_started", "agent_started", "workers_started"):
            if self._kind != "training":
                self._switch("starting", when)
        elif kind in ("worker_failed", "stopped", "finished"):
            self._switch("starting", when)

    def finish(self, now: float) -> list[Span]:
        if self._kind is not None and self._kind != "stopped":
            self._switch("stopped", now)
        return self._spans

    def _switch(self, kind: Kind, when: float) -> None:
        if self._kind is not None and when > self._since:
            last = self._spans[-1] if self._spans else None
            if last is not None and last.kind == self._kind != "training":
                self._spans[-1] = replace(last, end=when)
            else:
                self._spans.append(Span(self._kind, self._since, when))
        self._kind, self._since = kind, when


def _with_repeated(
    spans: list[Span], resumed: list[tuple[float, int]], steps: list[tuple[float, int]]
) -> list[Span]:
    """Mark the training of steps that a later training did again."""
    marks = sorted([*resumed, *steps])
    for began, step in resumed:
        first = last = bisect.bisect_left(marks, (began, -1))
        while first and marks[first - 1][1] > step:
            first -= 1
        if first < last:
            start = marks[max(0, first - 1)][0]  # when the step that was kept was done
            spans = [part for span in spans for part in _cut(span, start, began)]
    return spans


def _cut(span: Span, start: float, end: float) -> list[Span]:
    """Return a span with its training between two times marked as repeated."""
    if span.kind != "training" or span.end <= start or span.start >= end:
        return [span]
    parts = [replace(span, end=start)] if span.start < start else []
    parts.append(Span("repeated", max(span.start, start), min(span.end, end)))
    return [*parts, replace(span, start=end)] if span.end > end else parts


def _events(records: Iterable[tuple[float, dict[str, Any]]]) -> list[Event]:
    found = []
    for when, event in records:
        text = _LISTED.get(event["event"])
        if text is not None:
            fields = {name: str(value).split("\n")[0][:300] for name, value in event.items()}
            found.append(Event(when, event["event"], text.format_map(_Fields(fields))))
    return found


class _Fields(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return "?"
