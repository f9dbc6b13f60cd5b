"""The report as one HTML page: the table, the reasons, and the curves."""

from __future__ import annotations

from html import escape
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.verification import text
from dtrain.verification.compare import L2
from dtrain.verification.judge import Result
from dtrain.verification.report import Report, losses
from dtrain.verification.svg import Line, Mark, chart

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #6b7280; --line: #d8dee4;
  --paper: #ffffff; --good: #1a7f37; --bad: #cf222e; --odd: #9a6700; --same: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --good: #3fb950; --bad: #f85149; --odd: #d29922; --same: #58a6ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
small { color: var(--soft); font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
td.number { font-variant-numeric: tabular-nums; }
.green { color: var(--good); } .red { color: var(--bad); font-weight: 600; }
.yellow { color: var(--odd); }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .1rem .6rem; margin: .3rem 0 1.2rem; }
dt { color: var(--soft); } dd { margin: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem;
  width: fit-content; max-width: 100%; box-sizing: border-box; }
figcaption { font-size: .85rem; color: var(--soft); }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } .right { text-anchor: end; } .middle { text-anchor: middle; }
.axis { stroke: var(--soft); } .grid { stroke: var(--line); }
.mark { stroke: var(--odd); stroke-dasharray: 4 3; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.reference { stroke: #8b949e80; stroke-width: 7; } circle.reference { fill: none; }
polyline.good { stroke: var(--same); } circle.good { fill: var(--same); }
polyline.bad { stroke: var(--bad); } circle.bad { fill: var(--bad); }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: 1.2rem; height: .25rem; margin-right: .35rem;
  vertical-align: middle; }
"""
_COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#0f7b85", "#9a6700", "#57606a")


def write(report: Report, path: str | Path) -> None:
    """Write the page.

    Raises:
        UsageError: the page cannot be written to this path.
    """
    try:
        Path(path).write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", code="file.not-writable"
        ) from error


def page(report: Report) -> str:
    """Return the whole page. It needs no other file and no network."""
    colour = "green" if report.same else "red"
    verdict = f'<span class="{colour}">{text.summary(report)}</span>'
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>dtrain verify: {escape(report.job)}</title>",
            f"<style>{_STYLE}</style></head><body>",
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
            "</body></html>",
        ]
    )


def _table(report: Report) -> str:
    rows = [
        "<tr><th>layout</th><th>level</th><th>largest difference</th><th>first difference</th>"
        "<th>verdict</th></tr>"
    ]
    for result in report.results:
        words, colour = text.verdict_of(result)
        largest = "-" if result.largest is None else text.number(result.largest.value)
        rows.append(
            f"<tr><td>{escape(result.layout.name)}</td><td>{result.level or '-'}</td>"
            f'<td class="number">{largest}</td><td>{escape(text.where(result))}</td>'
            f'<td class="{colour}">{escape(words)}</td></tr>'
        )
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


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
    lines = [
        Line("reference", losses(report.recording), "reference"),
        Line(result.layout.name, losses(result.recording), "good" if result.passed else "bad"),
    ]
    picture = chart(lines, title=f"loss of {result.layout.name}")
    return f"<figure>{picture}<figcaption>{escape(result.layout.name)}</figcaption></figure>"


def _differences(report: Report) -> str:
    lines = [
        Line(result.layout.name, [at.gradients.relative for at in result.comparison.steps], f"c{k}")
        for k, result in enumerate(report.results)
        if result.comparison is not None
    ]
    marks = [Mark("L2, first step", L2.first_gradient), Mark("L2", L2.parameters)]
    title = "relative difference of the gradients"
    picture = chart(lines, title=title, width=680, height=300, log=True, marks=marks)
    legend, style = "", ""
    for line in lines:
        colour = _COLOURS[int(line.style[1:]) % len(_COLOURS)]
        style += f"polyline.{line.style} {{ stroke: {colour} }} "
        style += f"circle.{line.style} {{ fill: {colour} }} "
        legend += f'<span><i style="background: {colour}"></i>{escape(line.label)}</span>'
    caption = f'<figcaption class="legend">{legend}</figcaption>'
    return f"<style>{style}</style><figure>{picture}{caption}</figure>"
