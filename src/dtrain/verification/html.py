"""The report as one HTML page: the table, the reasons, and the curves."""

from __future__ import annotations

from html import escape
from pathlib import Path

from dtrain.page import document
from dtrain.page.chart import Line, Mark, Point, chart
from dtrain.verification import text
from dtrain.verification.compare import L2
from dtrain.verification.judge import Result
from dtrain.verification.report import Report, losses

_NUM_STYLES = 8


def write(report: Report, path: str | Path) -> None:
    """Write the page.

    Raises:
        UsageError: the page cannot be written to this path.
    """
    document.write(page(report), path)


def page(report: Report) -> str:
    """Return the whole page. It needs no other file and no network."""
    colour = "green" if report.same else "red"
    verdict = f'<span class="{colour}">{text.summary(report)}</span>'
    parts = [
        f"<h1>{escape(report.job)}: {verdict}</h1>",
        f"<p>{escape(text.opening(report))}.</p>",
        _table(report),
        f"<p>{escape(text.levels(report))}.</p>",
        *(f"<p>{escape(each)}.</p>" for each in text.left_out(report)),
        *_reasons(report),
        "<h2>Loss</h2><p>The broad grey curve is the reference. If a layout is the same "
        "training, its curve lies in the middle of it.</p>",
        f'<div class="cards">{"".join(_card(report, r) for r in report.results)}</div>',
        "<h2>Differences of the gradients</h2><p>Relative to the reference, step by step.</p>",
        _differences(report),
    ]
    return document.document(f"dtrain verify: {report.job}", parts)


def _table(report: Report) -> str:
    rows = []
    for result in report.results:
        words, colour = text.verdict_of(result)
        largest = "-" if result.largest is None else text.number(result.largest.value)
        rows.append(
            [
                escape(result.layout.name),
                result.level or "-",
                largest,
                escape(text.where(result)),
                f'<td class="{colour}">{escape(words)}</td>',
            ]
        )
    head = ("layout", "level", "largest difference", "first difference", "verdict")
    return document.table(head, rows)


def _reasons(report: Report) -> list[str]:
    parts = []
    for remark in text.remarks(report.results):
        code = f" <small>{remark.code}</small>" if remark.code else ""
        parts.append(f"<h2>{escape(remark.headline)}{code}</h2>")
        if remark.details:
            cells = (f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in remark.details.items())
            parts.append(f"<dl>{''.join(cells)}</dl>")
        if remark.raw:
            parts.append(f"<pre>{escape(remark.raw)}</pre>")
    return parts


def _card(report: Report, result: Result) -> str:
    name = result.layout.name
    own = "good" if result.passed else "bad"
    lines = [
        Line("reference", _by_step(losses(report.recording)), "reference"),
        Line(name, _by_step(losses(result.recording)), own),
    ]
    return chart(lines, title=name)


def _by_step(values: list[float | None]) -> list[Point]:
    return list(enumerate(values, 1))


def _differences(report: Report) -> str:
    compared = [result for result in report.results if result.comparison is not None]
    lines = [
        Line(
            result.layout.name,
            _by_step([at.gradients.relative for at in result.comparison.steps]),
            f"run{k % _NUM_STYLES}",
        )
        for k, result in enumerate(compared)
        if result.comparison is not None
    ]
    marks = [Mark("L2, first step", L2.first_gradient), Mark("L2", L2.parameters)]
    title = "relative difference of the gradients"
    picture = chart(lines, title=title, log=True, marks=marks)
    return document.legend((line.style, line.label) for line in lines) + (
        f'<div class="wide">{picture}</div>'
    )
