"""The screen of `dtrain top`, and its lines where there is no terminal."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.text import Text

from dtrain.console.fold import rank_label
from dtrain.run.files import duration, local_time
from dtrain.run.phases import PHASES, Phase
from dtrain.top.watch import RankNow, Watch, last_lines, shown_metrics

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS: dict[Phase, str] = {
    "data": "magenta", "forward": "green", "backward": "cyan", "reduction": "yellow",
    "optimizer": "blue", "evaluation": "red", "checkpoint": "white", "other": "bright_black",
}  # fmt: skip
_STATES = {"running": "green", "succeeded": "green", "failed": "red", "lost": "red"}
_WIDEST_CURVE = 40
_MOST_METRICS = 6
_MOST_WARNINGS = 3
# Of a line of dtrain's own, the time of day is enough.
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d{3} (?:INFO \S+: )?")
_KEYS = "↑↓ rank   l log   s stop   q quit"


@dataclass
class Choice:
    """What the person at the keyboard has chosen."""

    rank: int = 0
    shows_log: bool = False
    asks_to_stop: bool = False
    stopping: bool = False


def screen(watch: Watch, choice: Choice, width: int, height: int) -> Group:
    """Return the whole screen, in lines of at most `width` columns."""
    now = time.time()
    above = [*_head(watch, now, width), *_metrics(watch, width), *_nodes(watch)]
    below = [*_remarks(watch, now), _keys(choice)]
    room = height - len(above) - len(below) - 1
    middle = _log(watch, choice, room) if choice.shows_log else _ranks(watch, choice, width, room)
    lines = [*above, *middle, Text(), *below]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines)


def plain_line(watch: Watch) -> str:
    """Return one line about a run, for an output that is no terminal."""
    parts = [watch.state, _steps(watch)]
    for split, name, values in [*shown_metrics(watch)][:_MOST_METRICS]:
        label = name if split == "train" else f"{split} {name}"
        parts.append(f"{label} {values[-1][1]:.6g}")
    slow = watch.straggler()
    if slow is not None:
        parts.append(f"rank {slow[0]} takes {slow[1]:.1f} times the median")
    eta = watch.eta(time.time())
    if eta is not None and watch.state == "running":
        parts.append(f"ETA {duration(eta[0])}")
    return ", ".join(parts)


def _head(watch: Watch, now: float, width: int) -> Iterator[Text]:
    plan = watch.plan
    title = Text(watch.run.id, style="bold")
    title.append(f"  {watch.state}", style=_STATES.get(watch.state, "yellow"))
    nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    title.append(f"  {plan.launcher}, {plan.strategy}, {plan.world_size} ranks{nodes}")
    title.append(f"  attempt {watch.attempt}" if watch.attempt else "")
    yield title
    eta, text = watch.eta(now), ""
    if eta is not None and watch.state == "running":
        text = f"  ETA {local_time(now + eta[0]).split()[1]}, in {duration(eta[0])}"
        if eta[1] > 1.1 * eta[0]:
            text += f" ({duration(eta[1])} with stops)"
    line = Text(f"step {_steps(watch)} ")
    room = width - len(line) - len(text)
    if watch.total_steps and room >= 10:
        done = min(room, room * watch.step // watch.total_steps)
        line.append("━" * done, style="green").append("━" * (room - done), style="bright_black")
    yield line.append(text)


def _steps(watch: Watch) -> str:
    if watch.total_steps is None:
        return f"{watch.step:,}"
    percent = 100 * watch.step // max(1, watch.total_steps)
    return f"{watch.step:,}/{watch.total_steps:,} ({percent} %)"


def _metrics(watch: Watch, width: int) -> Iterator[Text]:
    shown = [*shown_metrics(watch)][:_MOST_METRICS]
    labels = [name if split == "train" else f"{split} {name}" for split, name, _ in shown]
    indent = max(map(len, labels), default=0)
    for label, (_, _, values) in zip(labels, shown, strict=True):
        line = Text(f"{label:<{indent}}  {values[-1][1]:<10.5g} ")
        line.append(curve([v for _, v in values], min(_WIDEST_CURVE, width - len(line))), "cyan")
        yield line


def curve(values: Sequence[float], width: int) -> str:
    """Return the course of values as one line of blocks, each the mean of its part.

    A constant has no course: the line is empty.
    """
    finite = [value for value in values if math.isfinite(value)]
    width = min(width, len(finite))
    if width < 1:
        return ""
    ends = [len(finite) * k // width for k in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means), max(means)
    if high - low <= 1e-9 * abs(high):
        return ""
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round(scale * (mean - low))] for mean in means)


def _nodes(watch: Watch) -> Iterator[Text]:
    for node_rank, record in sorted(watch.nodes.items())[:4]:
        ranks = record.get("ranks") or {}
        cores = sum(used for used, _ in ranks.values())
        line = Text(f"node {node_rank}  cores {cores:.1f} of {record.get('cpus', '?')}")
        if record.get("memory_total"):
            used, total = record["memory_used"], record["memory_total"]
            line.append(f"  memory {used / 1e9:.1f} of {total / 1e9:.1f} GB")
        for index, gpu in enumerate(record.get("gpus") or ()):
            line.append(f"  GPU {index}: {_gpu(gpu)}")
        yield line
    if len(watch.nodes) > 4:
        yield Text(f"and {len(watch.nodes) - 4} more nodes", style="dim")


def _gpu(gpu: dict[str, Any]) -> str:
    parts = []
    if "utilization" in gpu:
        parts.append(f"{gpu['utilization']} %")
    if gpu.get("memory_total"):
        parts.append(f"{gpu['memory_used'] / 1e9:.0f}/{gpu['memory_total'] / 1e9:.0f} GB")
    if "power" in gpu:
        parts.append(f"{gpu['power']:.0f} W")
    return " ".join(parts) or "?"


def _ranks(watch: Watch, choice: Choice, width: int, room: int) -> Iterator[Text]:
    """Yield a line for each rank, with the parts of its time, as far as there is room."""
    if not watch.ranks:
        yield Text("no phases yet: ranks record them every second", style="dim")
        return
    used = {phase for each in watch.ranks.values() for phase in each.phases}
    legend = Text("rank  ms/step  ")
    for phase in PHASES:
        if phase in used:
            legend.append(f"{phase[0].upper()}", style=f"black on {_COLOURS[phase]}")
            legend.append(f"{phase[1:]} ")
    yield legend
    slow = watch.straggler()
    first = min(choice.rank, max(0, len(watch.ranks) - (room - 2)))
    for rank in sorted(watch.ranks)[first : first + max(1, room - 1)]:
        remark = f"  {slow[1]:.1f} times the median" if slow and slow[0] == rank else ""
        bar = max(10, width - 17 - len(remark))
        yield _rank(watch.ranks[rank], bar, chosen=rank == choice.rank).append(remark, "yellow")


def _rank(each: RankNow, width: int, *, chosen: bool) -> Text:
    total = sum(each.phases.values())
    steps = f"{1000 * total / each.steps:>7.1f}" if each.steps else "      -"
    line = Text(f"{each.rank:>4}  {steps}  ", style="reverse" if chosen else "")
    column, share = 0, 0.0
    for phase in PHASES:
        share += each.phases.get(phase, 0.0) / total if total else 0.0
        end = round(width * share)
        text = phase[0].upper() * (end - column)
        line.append(text, style=f"not reverse black on {_COLOURS[phase]}")
        column = end
    return line


def _log(watch: Watch, choice: Choice, room: int) -> Iterable[Text]:
    yield Text(f"log of rank {choice.rank}", style="bold")
    for line in last_lines(watch, choice.rank, room - 1):
        yield Text(_STAMP.sub(r"\1 ", line).expandtabs())


def _remarks(watch: Watch, now: float) -> Iterator[Text]:
    if watch.checkpoint is not None:
        name, when = watch.checkpoint
        yield Text(f"checkpoint {name}, {duration(now - when)} ago")
    failures = watch.failures
    if failures:
        count = "a failure" if len(failures) == 1 else f"{len(failures)} failures, the last"
        yield Text(f"{count}: {failures[-1]}", style="red")
    for text, ranks in [*watch.warnings.items()][-_MOST_WARNINGS:]:
        label = f"{rank_label(ranks)} " if watch.plan.world_size > 1 else ""
        yield Text(f"{label}{text}", style="yellow")


def _keys(choice: Choice) -> Text:
    if choice.asks_to_stop:
        return Text("stop the run? Its workers save a checkpoint, then exit.  y yes   n no", "bold")
    if choice.stopping:
        return Text(f"stopping   {_KEYS}", style="dim")
    return Text(_KEYS, style="dim")
