"""The results of `dtrain bench` for people: tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dtrain.bench.results import (
    FASTER_LOADER,
    LEAST_S,
    MUCH_DATA,
    MUCH_OTHER,
    MUCH_REDUCTION,
    SLOW_LINK,
    Bench,
    Measured,
    Step,
    advice,
    slow_links,
)
from dtrain.words import counted, few, size

_MOST_NODES = 8
"""The most nodes of a matrix. Of more, the slowest links are listed."""
_MOST_LINKS = 16


def shown(bench: Bench) -> Iterator[RenderableType]:
    """Yield the tables, then what to change."""
    if bench.measured is not None:
        yield from _measured(bench.measured, bench.workers)
    if bench.step is not None:
        yield from _step(bench.step)
    yield Text()
    for part, why in bench.problems.items():
        yield Text(f"{part}: not measured: {why}")
    found = advice(bench)
    for line in found:
        yield Text(f"→ {line}", style="yellow")
    if not found:
        yield Text("nothing to change was found")
    yield Text(
        f"Advice is given only for links below {SLOW_LINK:.0%} of the median, from 3 nodes on; "
        f"loaders {FASTER_LOADER} times as fast; of steps of {LEAST_S:.0f} s or more, data from "
        f"{MUCH_DATA:.0%}, reduction from {MUCH_REDUCTION:.0%} and other from {MUCH_OTHER:.0%}. "
        f"{'Runs' if len(bench.runs) > 1 else 'Run'}: {', '.join(bench.runs)}",
        style="dim",
    )


def _measured(found: Measured, workers: int | None) -> Iterator[RenderableType]:
    where = f"{counted(found.ranks, 'rank')} on {counted(len(found.nodes), 'node')}"
    yield Text(f"{where} ({few(found.nodes)}), {found.device}")
    if found.copy_bytes_per_s is not None and found.collectives:
        yield _title(f"collectives; a copy in memory has {_rate(found.copy_bytes_per_s)}")
        yield _collectives(found, found.copy_bytes_per_s)
    if found.links and len(found.nodes) <= _MOST_NODES:
        yield _title("links from row to column: MB/s, and µs of a short message; ! is slow")
        yield _matrix(found)
    elif found.links:
        yield _title(f"the slowest of {len(found.links)} links")
        yield _slowest(found)
    if found.store is not None:
        yield _title("store, with all ranks at once")
        table = _table("", "µs a call", "calls/s of a rank")
        for name, seconds in (("set", found.store.set_s), ("get", found.store.get_s)):
            table.add_row(name, _micro(seconds), f"{1 / seconds:,.0f}")
        yield table
    if found.loader:
        yield _title("loader, all ranks together")
        table = _table("workers of a rank", "samples/s")
        for each in found.loader:
            now = " (now)" if each.workers == workers else ""
            table.add_row(f"{each.workers}{now}", f"{each.samples_per_s:,.0f}")
        yield table


def _title(text: str) -> Text:
    """Return a line above a table, which may be wider than the table."""
    return Text(f"\n{text}", style="bold")


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _collectives(found: Measured, copy: float) -> Table:
    table = _table("", "size", "µs", "algorithm", "bus", "bus, % of copy")
    last = ""
    for each in sorted(found.collectives, key=lambda each: each.operation):
        bus = each.bus_bytes_per_s(found.ranks)
        name = "" if each.operation == last else each.operation
        last = each.operation
        table.add_row(
            name, size(each.bytes), _micro(each.seconds), _rate(each.bytes_per_s), _rate(bus),
            f"{100 * bus / copy:.1f}",
        )  # fmt: skip
    return table


def _matrix(found: Measured) -> Table:
    slow = {(link.source, link.target) for link, _ in slow_links(found.links)}
    links = {(link.source, link.target): link for link in found.links}
    table = _table("")
    nodes = range(len(found.nodes))
    for node in nodes:
        table.add_column(f"{node}", justify="right")
    for source in nodes:
        cells = []
        for target in nodes:
            link = links.get((source, target))
            mark = "!" if (source, target) in slow else ""
            rate = "-" if link is None else f"{mark}{link.bytes_per_s / 1e6:,.0f}"
            cells.append(rate if link is None else f"{rate}\n{_micro(link.latency_s)}")
        table.add_row(f"{source} {found.nodes[source]}", *cells)
    return table


def _slowest(found: Measured) -> Table:
    table = _table("from", "to", "rate", "µs")
    for link in sorted(found.links, key=lambda each: each.bytes_per_s)[:_MOST_LINKS]:
        names = found.nodes[link.source], found.nodes[link.target]
        table.add_row(*names, _rate(link.bytes_per_s), _micro(link.latency_s))
    return table


def _step(step: Step) -> Iterator[RenderableType]:
    each_ms = 1000 * step.seconds / step.steps
    yield _title(f"a step of {each_ms:.3g} ms, the mean of {step.steps} on all ranks")
    table = _table("", "ms", "%")
    for phase, share in step.shares.items():
        if share:
            table.add_row(phase, f"{share * each_ms:.2f}", f"{100 * share:.1f}")
    yield table


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}"


def _rate(bytes_per_s: float) -> str:
    return f"{size(round(bytes_per_s))}/s"
