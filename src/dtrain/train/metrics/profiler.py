"""Records some steps of a rank with torch.profiler: a trace, a memory snapshot and a summary."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dtrain.job.spec import StepProfileSpec
from dtrain.ranks import RankInfo
from dtrain.run import files
from dtrain.run.events import note_event
from dtrain.run.phases import Phase
from dtrain.run.rundir import RunDir
from dtrain.run.step_profile import Communication, Operator, StepProfile

logger = logging.getLogger(__name__)

_MOST_OPERATORS = 50
_MOST_MEMORY_EVENTS = 100_000
_STEP, _PHASE = "ProfilerStep#", "dtrain: "
"""The beginnings of the names of ranges in a trace. TensorBoard and other tools know the first."""


class StepProfiler:
    """Records the wanted steps. Before and after them it only compares two numbers per step."""

    def __init__(
        self,
        spec: StepProfileSpec,
        run: RunDir,
        ranks: RankInfo,
        attempt: int,
        device: torch.device,
    ) -> None:
        self._first, self._last = spec.steps
        self._run, self._ranks, self._attempt = run, ranks, attempt
        self._device = device
        self._profile: profile | None = None
        self._started = 0.0
        self._began_with = self._step = 0
        """The first step that is recorded, and the number of steps done."""
        self._step_range: Any = None
        self._phase_range: Any = None

    def step_begins(self, done: int) -> None:
        """Begin to record before the first of the wanted steps, and end after the last one.

        Args:
            done: the number of steps done.
        """
        self._step = done
        if self._profile is not None:
            self._end_ranges()
            if done >= self._last:
                self._finish()
                return
        elif not self._first <= done + 1 <= self._last:
            return
        else:
            self._start(done + 1)
        self._step_range = _opened(f"{_STEP}{done + 1}")

    def enter(self, phase: Phase) -> None:
        """Show in the trace that the rank enters a phase of its step."""
        if self._profile is None:
            return
        if self._phase_range is not None:
            self._phase_range.__exit__(None, None, None)
        self._phase_range = _opened(_PHASE + phase)

    def close(self) -> None:
        """Write what was recorded, if the training has ended before the last wanted step."""
        if self._profile is not None:
            self._end_ranges()
            self._finish()

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_MEMORY_EVENTS)
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()
        self._synchronize()
        self._began_with, self._started = step, time.perf_counter()

    def _end_ranges(self) -> None:
        for each in (self._phase_range, self._step_range):
            if each is not None:
                each.__exit__(None, None, None)
        self._phase_range = self._step_range = None

    def _finish(self) -> None:
        """Write the files. A full disk, or a device that has failed, must not be a new error."""
        recorded, self._profile = self._profile, None
        assert recorded is not None
        try:
            self._synchronize()
            seconds = time.perf_counter() - self._started
            recorded.stop()
            if self._step >= self._began_with:
                self._write(recorded, seconds)
        except (OSError, RuntimeError) as error:
            logger.warning("the profile could not be written: %s", error)
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile, seconds: float) -> None:
        place = (self._attempt, self._ranks.node_rank, self._ranks.rank)
        trace, memory = self._run.trace(*place), self._run.memory_snapshot(*place)
        files.make_parent(trace)
        hidden = trace.with_name(f".{trace.name}")  # a copy must not have a part of it
        recorded.export_chrome_trace(str(hidden))
        os.replace(hidden, trace)
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.memory._dump_snapshot(str(memory))
        spans = list(_spans(recorded.events() or ()))
        found = StepProfile(
            rank=self._ranks.rank,
            attempt=self._attempt,
            restart=self._ranks.restart,
            first_step=self._began_with,
            last_step=self._step,
            device=torch.cuda.get_device_name(self._device) if is_cuda else "cpu",
            seconds=seconds,
            operators=slowest(recorded.key_averages(), seconds, on_device=is_cuda),
            communication=communication(spans, seconds),
            trace=self._shown(trace),
            memory=self._shown(memory) if is_cuda else None,
        )
        files.write_json(self._run.step_profile(*place), asdict(found))
        note_event(
            self._run, "profiled", rank=found.rank, attempt=self._attempt, trace=found.trace,
            first=found.first_step, last=found.last_step,
        )  # fmt: skip

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self._run.path))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _opened(name: str) -> Any:
    opened = record_function(name)
    opened.__enter__()
    return opened


class Span(NamedTuple):
    """The time of one call, in seconds."""

    name: str
    start: float
    end: float
    is_communication: bool


def _spans(events: Iterable[Any]) -> Iterator[Span]:
    """Yield when the rank communicated, and when it computed: on the GPU if there is one."""
    events = list(events)
    has_device = any(event.device_type != DeviceType.CPU for event in events)
    for event in events:
        on_device = event.device_type != DeviceType.CPU
        name = event.name.partition("(")[0]
        # gloo's threads; kernels of NCCL
        exchanges = name.startswith("gloo:") or (on_device and "nccl" in name.lower())
        if not exchanges and (on_device != has_device or event.is_async):
            continue
        times = event.time_range
        if exchanges:
            yield Span(name, times.start / 1e6, times.end / 1e6, True)
        elif not (event.is_user_annotation or "c10d" in name or name == "PythonSubclass"):
            # these may wait for an exchange, also where another operator calls them
            for start, end in _without_calls(event):
                yield Span(name, start / 1e6, end / 1e6, False)


def _without_calls(event: Any) -> Iterator[tuple[float, float]]:
    """Yield the times of an operator in which it calls no other operator."""
    at = event.time_range.start
    for call in sorted(event.cpu_children, key=lambda each: each.time_range.start):
        if call.time_range.start > at:
            yield at, call.time_range.start
        at = max(at, call.time_range.end)
    if event.time_range.end > at:
        yield at, event.time_range.end


def slowest(averages: Iterable[Any], seconds: float, *, on_device: bool) -> list[Operator]:
    """Return the slowest operators.

    Args:
        averages: what `torch.profiler.profile.key_averages` returns.
        seconds: the time of all steps.
        on_device: whether the time on the GPU counts, and not that on the CPU.
    """
    found = []
    for each in averages:
        if each.device_type != DeviceType.CPU or each.key.startswith(("ProfilerStep", _PHASE)):
            continue
        cpu_s, device_s = each.self_cpu_time_total / 1e6, each.self_device_time_total / 1e6
        own = device_s if on_device else cpu_s
        if own > 0:
            share = own / seconds
            found.append(Operator(each.key, each.count, round(cpu_s, 6), round(device_s, 6), share))
    found.sort(key=lambda each: each.share, reverse=True)
    return found[:_MOST_OPERATORS]


def communication(spans: Iterable[Span], seconds: float) -> Communication:
    """Return how long a rank communicated in steps that took some seconds."""
    spans = list(spans)
    own = _merged((each.start, each.end) for each in spans if each.is_communication)
    computed = _merged((each.start, each.end) for each in spans if not each.is_communication)
    spent = sum(end - start for start, end in own)
    return Communication(
        seconds=spent,
        share=spent / seconds,
        overlapped=_common(own, computed) / spent if spent else 0.0,
        calls=dict(Counter(each.name for each in spans if each.is_communication)),
    )


Intervals = list[tuple[float, float]]


def _merged(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Return sorted intervals that do not overlap."""
    found: Intervals = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _common(one: Intervals, other: Intervals) -> float:
    """Return the length of what two sorted lists of intervals have in common."""
    total, at = 0.0, 0
    for start, end in one:
        while at < len(other) and other[at][1] <= start:
            at += 1
        for low, high in other[at:]:
            if low >= end:
                break
            total += min(end, high) - max(start, low)
    return total
