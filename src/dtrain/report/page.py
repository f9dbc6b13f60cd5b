"""The course of one or several runs as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from statistics import median
from typing import Any

import yaml

from dtrain.comparing.compare import Comparison, compare
from dtrain.comparing.text import parting_text, value_text
from dtrain.page.chart import Line, chart, number, safe
from dtrain.page.document import document, folded, legend, table
from dtrain.plainjson import to_json
from dtrain.report.history import History, read
from dtrain.report.phase_grid import NUM_COLUMNS, PhaseGrid
from dtrain.report.timeline import KIND_TEXTS, KINDS
from dtrain.run.files import duration, local_time
from dtrain.run.phases import PHASES
from dtrain.run.rundir import RunDir
from dtrain.run.step_profile import StepProfile

_NUM_STYLES = 8
_MOST_ROWS = 128
"""The most ranks in a heat map and in a table of phases."""
_MOST_TABLE_STEPS = 50
_FIRST_METRICS = ("loss", "lr", "samples_per_second", "grad_norm")
"""The metrics whose charts come first."""
_NUM_SHADES = 8
_SHARES = {
    "steps": "training steps that count",
    "evaluation": "evaluations",
    "checkpoint": "standing still for checkpoints",
    "repeated": KIND_TEXTS["repeated"],
    "starting": KIND_TEXTS["starting"],
    "queued": KIND_TEXTS["queued"],
    "stopped": KIND_TEXTS["stopped"],
}


def page_of(runs: Sequence[RunDir]) -> str:
    """Return a page about the course of one or several runs.

    Raises:
        DamagedError: a file of a run cannot be read.
    """
    comparison = compare(runs) if len(runs) > 1 else None
    return page([read(run) for run in runs], comparison)


def page(histories: Sequence[History], comparison: Comparison | None = None) -> str:
    """Return the whole page. It needs no other file and no network.

    Args:
        histories: the courses of the runs.
        comparison: what differs between them.
    """
    names = _title(histories)
    parts = [
        f"<h1>{escape(names)}</h1>",
        _overview(histories),
        *_verdicts(histories),
        "<h2>Metrics</h2>",
        _legend(histories),
        *_metrics(histories),
        "<h2>What happened when</h2>",
        *_timelines(histories),
        "<h2>What the time went to</h2>",
        *_shares(histories),
        *_phases(histories),
        *_profiles(histories),
        *_usage(histories),
        *_differences(comparison),
        "<h2>Job</h2>",
        *_jobs(histories),
    ]
    return document(f"dtrain report: {names}", parts)


def _title(histories: Sequence[History]) -> str:
    sweeps = {each.summary.get("sweep") for each in histories}
    if len(histories) > 1 and len(sweeps) == 1 and (sweep := sweeps.pop()):
        return f"{sweep} ({len(histories)} runs)"
    return ", ".join(each.id for each in histories)


def _style(index: int) -> str:
    return f"run{index % _NUM_STYLES}"


def _legend(histories: Sequence[History]) -> str:
    if len(histories) == 1:
        return ""
    return legend((_style(k), each.label) for k, each in enumerate(histories))


# -- the top ---------------------------------------------------------------------------------


def _overview(histories: Sequence[History]) -> str:
    rows = []
    for k, each in enumerate(histories):
        row = each.summary
        colour = {"succeeded": "green", "failed": "red", "lost": "red"}.get(row["state"], "yellow")
        rows.append(
            [
                f'<i class="swatch {_style(k)}"></i>{escape(each.label)}',
                f'<td class="{colour}">{escape(row["state"])}</td>',
                escape(f"{row['launcher']}, {row['strategy']}, {row['world_size']} ranks"),
                local_time(row["started"]) if row["started"] else "-",
                "-" if row["duration"] is None else duration(row["duration"]),
                _steps(row),
                _percent(each.goodput()),
                escape(_last(row)),
                escape(str(row["checkpoint"] or "-")),
            ]
        )
    head = ("run", "state", "launched", "started", "duration", "steps", "goodput", "last values",
            "checkpoint")  # fmt: skip
    return table(head, rows)


def _steps(row: Mapping[str, Any]) -> str:
    done, total = row["step"], row["total_steps"]
    return str(done) if total in (None, done) else f"{done or 0} of {total}"


def _last(row: Mapping[str, Any]) -> str:
    values = row["eval"] or {k: v for k, v in row["train"].items() if k == "loss"}
    return ", ".join(f"{name} {number(value)}" for name, value in values.items()) or "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _verdicts(histories: Sequence[History]) -> Iterator[str]:
    for each in histories:
        for attempt, text in each.verdicts:
            yield f"<h3>{escape(each.id)}, attempt {attempt}</h3><pre>{escape(text)}</pre>"


# -- metrics ---------------------------------------------------------------------------------


def _metrics(histories: Sequence[History]) -> Iterator[str]:
    known = {name for each in histories for _, name in each.series}
    names = [name for name in _FIRST_METRICS if name in known]
    names += sorted(known - {*_FIRST_METRICS})
    if not names:
        yield '<p class="note">No metrics were written.</p>'
        return
    yield f'<div class="cards">{"".join(_metric(histories, name) for name in names)}</div>'
    yield folded("The values as a table", _metrics_table(histories, names))


def _metric(histories: Sequence[History], name: str) -> str:
    lines = [
        Line(_label(each, split, len(histories)), list(values.items()), _line_style(k, split))
        for k, each in enumerate(histories)
        for (split, metric), values in sorted(each.series.items(), reverse=True)
        if metric == name
    ]
    return chart(lines, title=name)


def _label(history: History, split: str, number_of_runs: int) -> str:
    return split if number_of_runs == 1 else f"{history.id} {split}"


def _line_style(index: int, split: str) -> str:
    return _style(index) if split == "train" else f"{_style(index)} dashed"


def _metrics_table(histories: Sequence[History], names: Sequence[str]) -> str:
    """Return a table with a row for each of at most 50 steps."""
    columns = [
        (f"{split} {name}" if len(histories) == 1 else f"{each.id} {split} {name}", values)
        for name in names
        for each in histories
        for (split, metric), values in sorted(each.series.items(), reverse=True)
        if metric == name
    ]
    steps = sorted({step for _, values in columns for step in values})
    every = -(-len(steps) // _MOST_TABLE_STEPS) or 1
    chosen = sorted({*steps[::every], *steps[-1:]})
    rows = [
        [str(step), *(number(v[step]) if step in v else "" for _, v in columns)] for step in chosen
    ]
    return table(["step", *(name for name, _ in columns)], rows, numbers=0)


# -- time ------------------------------------------------------------------------------------


def _timelines(histories: Sequence[History]) -> Iterator[str]:
    longest = max((each.timeline.end - each.timeline.start for each in histories), default=0.0)
    if not longest:
        yield '<p class="note">Nothing has started.</p>'
        return
    kinds = {span.kind for each in histories for span in each.timeline.spans}
    yield legend((kind, KIND_TEXTS[kind]) for kind in KINDS if kind in kinds)
    lanes = "".join(
        f'<span title="{escape(each.id)}">{escape(each.id)}</span>{_lane(each, longest)}'
        for each in histories
    )
    scale = f'<span></span><div class="times"><span>0</span><span>{duration(longest)}</span></div>'
    yield f'<figure><div class="lane">{lanes}{scale}</div></figure>'
    yield (
        '<p class="note">Thin lines are checkpoints, red lines are failures. '
        "The scale is the time since the start of each run.</p>"
    )
    for each in histories:
        yield folded(f"All of {each.id} as a table", _events_table(each))


def _lane(history: History, longest: float) -> str:
    line = history.timeline

    def x(when: float) -> float:
        return 1000 * (when - line.start) / longest

    rects = (
        f'<rect class="{span.kind}" x="{x(span.start):.2f}" y="0" height="20" '
        f'width="{max(0.4, x(span.end) - x(span.start)):.2f}">'
        f"<title>{KIND_TEXTS[span.kind]}: {duration(span.seconds)}</title></rect>"
        for span in line.spans
        if span.kind != "stopped" or span is not line.spans[-1]
    )
    marks = (
        f'<line class="{_MARKED[event.event]}" x1="{x(event.time):.2f}" x2="{x(event.time):.2f}" '
        f'y1="0" y2="20"><title>{escape(event.text)}</title></line>'
        for event in line.events
        if event.event in _MARKED
    )
    return (
        '<svg viewBox="0 0 1000 20" height="26" preserveAspectRatio="none" role="img">'
        f"<title>what {escape(history.id)} did when</title>{''.join(rects)}{''.join(marks)}</svg>"
    )


_MARKED = {"checkpoint_saved": "event", "worker_failed": "failure", "checkpoint_failed": "failure"}


def _events_table(history: History) -> str:
    line = history.timeline
    rows = [
        (event.time, f'<td class="long">{escape(event.text)}</td>')
        for event in _without_many_checkpoints(line.events)
    ]
    rows += [
        (s.start, f"<td>{KIND_TEXTS[s.kind]} ({duration(s.seconds)})</td>") for s in line.spans
    ]
    cells = [
        [local_time(when), duration(when - line.start), text]
        for when, text in sorted(rows, key=lambda row: row[0])
    ]
    return table(("time", "since the start", "what"), cells)


def _without_many_checkpoints(events: Iterable[Any]) -> list[Any]:
    """Return events with at most the last 100 checkpoints."""
    listed = list(events)
    saved = [each for each in listed if each.event == "checkpoint_saved"]
    left_out = {id(each) for each in saved[:-100]}
    return [each for each in listed if id(each) not in left_out]


def _shares(histories: Sequence[History]) -> Iterator[str]:
    yield (
        '<p class="note">Goodput is the share of the wall time that trained steps which count: '
        "steps that a failure undid, evaluations, checkpoints, starts and queues are not in it.</p>"
    )
    shares = [each.shares() for each in histories]
    rows = []
    for name, text in _SHARES.items():
        cells = []
        for each in shares:
            total = sum(each.values())
            cells.append(f"{_lasted(each[name])} ({_percent(each[name] / total if total else 0)})")
        if any(each[name] for each in shares):
            rows.append([text, *cells])
    yield table(["", *(each.id for each in histories)], rows, numbers=1)


def _lasted(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


# -- phases ----------------------------------------------------------------------------------


def _phases(histories: Sequence[History]) -> Iterator[str]:
    known = [each for each in histories if each.phases.ranks]
    if not known:
        return
    yield "<h2>Phases of the ranks</h2>"
    for each in known:
        grid = each.phases
        if len(histories) > 1:
            yield f"<h3>{escape(each.id)}</h3>"
        straggler = grid.straggler()
        if straggler is not None and each.summary["strategy"] != "fsdp":
            rank, ratio = straggler
            yield (
                f"<p><strong>Rank {rank} is a straggler</strong>: its own part of a step takes "
                f"{ratio:.1f} times as long as that of the median rank. The others wait for it.</p>"
            )
        rows = _slowest(grid)
        if len(rows) < len(grid.ranks):
            yield f'<p class="note">The {_MOST_ROWS} slowest of {len(grid.ranks)} ranks.</p>'
        own = _milliseconds(grid.own_seconds())
        maps = [
            _heat_map("Own time of a step, without waiting for other ranks (darker: slower than "
                      "the median of the ranks)", grid, rows, own, "ms", relative=True),
            _heat_map("Waiting for data, share of the time", grid, rows,
                      _percents(grid.shares("data")), "%"),
            _heat_map("Waiting for the reduction of gradients, share of the time", grid, rows,
                      _percents(grid.shares("reduction")), "%"),
        ]  # fmt: skip
        yield f'<div class="cards heats">{"".join(maps)}</div>'
        yield folded("Seconds of each rank in each phase, as a table", _phase_table(grid, rows))


def _slowest(grid: PhaseGrid) -> list[int]:
    """Return the positions of the ranks to show: all, or the slowest of many."""
    own = grid.own_seconds()
    if len(own) <= _MOST_ROWS:
        return list(range(len(own)))

    def mean(row: int) -> float:
        known = [value for value in own[row] if value is not None]
        return sum(known) / len(known) if known else 0.0

    return sorted(sorted(range(len(own)), key=mean)[-_MOST_ROWS:])


def _milliseconds(cells: list[list[float | None]]) -> list[list[float | None]]:
    return [[None if v is None else float(f"{1000 * v:.3g}") for v in row] for row in cells]


def _percents(cells: list[list[float | None]]) -> list[list[float | None]]:
    return [[None if v is None else round(100 * v, 1) for v in row] for row in cells]


def _heat_map(
    title: str,
    grid: PhaseGrid,
    rows: Sequence[int],
    cells: list[list[float | None]],
    unit: str,
    *,
    relative: bool = False,
) -> str:
    """Return a heat map of ranks and time.

    Args:
        title: its title.
        grid: the ranks and times.
        rows: the positions of the ranks to show.
        cells: for each rank and column a value.
        unit: the unit of the values.
        relative: whether a shade shows by how much a value exceeds the median of its column, from
            1 to 2 times. Otherwise it shows the percentage.
    """
    columns = list(zip_longest(*cells))
    medians = [median(known) if (known := _known(column)) else 0.0 for column in columns]
    shades: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(cells[row]):
            if value is None:
                continue
            high = value / 100
            if relative:
                high = value / medians[x] - 1 if medians[x] else 0.0
            shade = min(_NUM_SHADES, max(0, round(_NUM_SHADES * high)))
            shades.setdefault(shade, []).append(f"M{x} {y}h1v1h-1z")
    paths = "".join(
        f'<path style="opacity:{0.06 + 0.94 * shade / _NUM_SHADES:.2f}" d="{"".join(parts)}"/>'
        for shade, parts in sorted(shades.items())
    )
    ranks = grid.ranks
    width = (grid.end - grid.start) / NUM_COLUMNS
    names = [f"rank {ranks[row]}" for row in rows]
    data = {
        "rows": names,
        "columns": [duration(column * width) for column in range(NUM_COLUMNS)],
        "cells": [[None if v is None else f"{v:g} {unit}" for v in cells[row]] for row in rows],
    }
    ends = dict.fromkeys((names[0], names[-1]))
    first_and_last = "".join(f"<span>{each}</span>" for each in ends)
    height = min(24, max(3, 192 // len(rows))) * len(rows)
    return (
        f'<figure class="heat{" slow" if relative else ""}"><figcaption>{title}</figcaption>'
        f'<div class="lane"><div class="rows">{first_and_last}</div>'
        f'<svg viewBox="0 0 {NUM_COLUMNS} {len(rows)}" height="{height}" '
        f'preserveAspectRatio="none" shape-rendering="crispEdges" role="img">'
        f"<title>{title}</title>{paths}</svg><span></span>"
        f'<div class="times"><span>0</span><span>{duration(grid.end - grid.start)}</span></div>'
        f'</div><script type="application/json">{safe(to_json(data))}</script></figure>'
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _phase_table(grid: PhaseGrid, rows: Sequence[int]) -> str:
    seconds = [(grid.ranks[row], grid.rank_seconds(grid.ranks[row])) for row in rows]
    used = [phase for phase in PHASES if any(phase in spent for _, spent in seconds)]
    cells = [
        [f"rank {rank}", f"{spent.get('steps', 0):.0f}"]
        + [f"{spent.get(phase, 0.0):.2f}" for phase in used]
        for rank, spent in seconds
    ]
    return table(["", "steps", *used], cells, numbers=1)


# -- profiles --------------------------------------------------------------------------------


def _profiles(histories: Sequence[History]) -> Iterator[str]:
    """Yield what `--profile` recorded of each rank: a line, and its slowest operators."""
    known = [each for each in histories if each.profiles]
    if not known:
        return
    yield "<h2>Profile</h2>"
    for each in known:
        if len(histories) > 1:
            yield f"<h3>{escape(each.id)}</h3>"
        shown = each.profiles[:_MOST_ROWS]
        head = ("", "trace", "steps", "ms a step", "communication", "overlapped")
        yield table(head, map(_profile_row, shown), numbers=2)
        for profile in shown:
            title = f"The slowest operators of {_of_rank(profile)}"
            yield folded(title, _operators(profile))
    yield (
        '<p class="note">Open a trace at <a href="https://ui.perfetto.dev">ui.perfetto.dev</a>. '
        "Its path is in the run directory. Communication includes waiting for slower ranks; "
        "overlapped is the part of it during which the rank also computed.</p>"
    )


def _of_rank(profile: StepProfile) -> str:
    return f"rank {profile.rank}, attempt {profile.attempt}"


def _profile_row(profile: StepProfile) -> list[str]:
    part = profile.communication
    files = [profile.trace, *([profile.memory] if profile.memory else [])]
    return [
        _of_rank(profile),
        f'<td class="long">{escape(", ".join(files))}</td>',
        f"{profile.first_step}-{profile.last_step}",
        f"{1000 * profile.seconds / profile.num_steps:.4g}",
        _percent(part.share),
        _percent(part.overlapped) if part.seconds else "-",
    ]


def _operators(profile: StepProfile) -> str:
    rows = [
        [escape(each.name), str(each.calls), f"{1000 * each.cpu_s:.3f}"]
        + ([] if profile.memory is None else [f"{1000 * each.device_s:.3f}"])
        + [_percent(each.share)]
        for each in profile.operators
    ]
    device = [] if profile.memory is None else ["GPU ms"]
    return table(["operator", "calls", "CPU ms", *device, "share"], rows, numbers=1)


# -- use and job -----------------------------------------------------------------------------


def _usage(histories: Sequence[History]) -> Iterator[str]:
    names = dict.fromkeys(name for each in histories for name in each.usage)
    if not names:
        return
    yield "<h2>Nodes</h2>" + _legend(histories)
    charts = (
        chart(
            [
                Line(each.id, each.usage[name], _style(k))
                for k, each in enumerate(histories)
                if name in each.usage
            ],
            title=name,
            x_label="seconds since the start",
        )
        for name in names
    )
    yield f'<div class="cards">{"".join(charts)}</div>'


def _differences(comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        return
    names = [str(run["id"]) for run in comparison.runs]
    yield "<h2>What differs</h2>"
    for each in comparison.losses:
        yield f"<p>{escape(parting_text(each, names[0]))}.</p>"
    rows = [
        [
            title,
            escape(name),
            *(f'<td class="long">{escape(value_text(name, each))}</td>' for each in values),
        ]
        for title, section in comparison.sections.items()
        for name, values in section.items()
    ]
    yield table(["", "", *names], rows)
    if comparison.unknown:
        yield f'<p class="note">Not recorded of all runs: {", ".join(comparison.unknown)}.</p>'
    for note in comparison.notes:
        yield f'<p class="note">{escape(note)}.</p>'


def _jobs(histories: Sequence[History]) -> Iterator[str]:
    for each in histories:
        text = yaml.safe_dump(each.job, sort_keys=False, allow_unicode=True)
        yield folded(f"The job of {each.id}", f"<pre>{escape(text)}</pre>")
