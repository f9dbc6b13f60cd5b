"""Line charts of a page. The picture is SVG, stretched to the page; its texts are HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from dtrain.plainjson import to_json

_WIDTH, _HEIGHT = 1000, 400
"""The units of a picture. A browser stretches them, without the width of strokes."""
_MOST_POINTS = 800
"""The most points of a line that are drawn; of more, the lowest and highest of each part."""
_NUM_TICKS = 4

Point = tuple[float, float | None]
"""x and y; y is None where there is a gap."""


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[Point]
    """In the order of x."""
    style: str
    """The CSS class, for example `run0`."""


@dataclass(frozen=True)
class Mark:
    """A horizontal line with a label."""

    label: str
    value: float


@dataclass(frozen=True)
class _Frame:
    """The positions of values in the picture."""

    left: float
    right: float
    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        return _WIDTH * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return _HEIGHT * (1 - self.share(value))

    def share(self, value: float) -> float:
        """Return how high in the picture a value is, from 0 to 1."""
        scaled = math.log10(value) if self.log else value
        return (scaled - self.low) / (self.high - self.low)


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    log: bool = False,
    marks: Sequence[Mark] = (),
    x_label: str = "step",
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Return a chart as a `<figure>`. With `log`, values of 0 or less are left out."""
    lines = [Line(each.label, _thinned(each.points, log), each.style) for each in lines]
    frame = _frame(lines, log, marks)
    ticks = [(frame.share(value), text) for value, text in _ticks(frame)]
    y_labels = (f'<span style="bottom:{100 * at:.2f}%">{text}</span>' for at, text in ticks)
    grid = (
        f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        for y in (_HEIGHT * (1 - at) for at, _ in ticks)
    )
    curves = "".join(curve for line in lines for curve in _curves(line, frame))
    marked = "".join(_marked(mark, frame) for mark in marks)
    mark_labels = "".join(
        f'<span class="marked" style="bottom:{100 * frame.share(mark.value):.2f}%">'
        f"{escape(mark.label)}</span>"
        for mark in marks
    )
    data = to_json([[line.label, line.style, _compact(line.points)] for line in lines])
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<div class="plot" data-x="{escape(x_label)}" data-left="{frame.left!r}"'
        f' data-right="{frame.right!r}">'
        f'<svg viewBox="{box}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(title)}</title>{''.join(grid)}{marked}{curves}</svg>"
        f'<div class="y">{"".join(y_labels)}{mark_labels}</div>'
        f'<script type="application/json">{safe(data)}</script></div>'
        f'<div class="x"><span>{x_text(frame.left)}</span><span>{escape(x_label)}</span>'
        f"<span>{x_text(frame.right)}</span></div></figure>"
    )


def safe(data: str) -> str:
    """Return JSON that cannot end the `<script>` that holds it."""
    return data.replace("<", "\\u003c")


def number(value: float) -> str:
    """Return a value with five digits."""
    return f"{value:.5g}"


def _thinned(points: Sequence[Point], log: bool) -> list[Point]:
    """Return the points that are drawn: all, or the lowest and highest of each part of many."""
    fitting = [(x, y if y is not None and _fits(y, log) else None) for x, y in points]
    if len(fitting) <= _MOST_POINTS:
        return fitting
    thinned: list[Point] = [fitting[0]]
    size = 2 * len(fitting) / _MOST_POINTS
    for part in range(_MOST_POINTS // 2):
        known = [p for p in fitting[int(part * size) : int((part + 1) * size)] if p[1] is not None]
        if known:
            thinned += sorted({min(known, key=_height), max(known, key=_height)})
    return [*thinned, fitting[-1]]


def _height(point: Point) -> float:
    return point[1] or 0.0


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _compact(points: Iterable[Point]) -> list[list[float | None]]:
    return [[int(x) if x == int(x) else x, y if y is None else float(number(y))] for x, y in points]


def _frame(lines: Sequence[Line], log: bool, marks: Sequence[Mark]) -> _Frame:
    values = [y for line in lines for _, y in line.points if y is not None]
    values += [mark.value for mark in marks]
    scaled = [math.log10(value) if log else value for value in values] or [0.0]
    low, high = min(scaled), max(scaled)
    if log:
        low, high = math.floor(low), math.floor(high) + 1
    if high - low < 1e-12 * max(1.0, abs(high)):
        around = 0.1 * abs(high) or 0.5
        low, high = low - around, high + around
    margin = 0.0 if log else 0.05 * (high - low)
    ends = [x for line in lines for x, _ in line.points] or [0.0]
    left, right = min(ends), max(ends)
    return _Frame(left, right if right > left else left + 1, low - margin, high + margin, log)


def _curves(line: Line, frame: _Frame) -> list[str]:
    """Return a polyline for each part of a line without gaps. A single point is drawn as a dot."""
    parts: list[list[str]] = [[]]
    for x, y in line.points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append(f"{frame.x(x):.1f},{frame.y(y):.1f}")
    label = f"<title>{escape(line.label)}</title>"
    return [
        f'<polyline class="{line.style}" points="{" ".join(part * (2 if len(part) == 1 else 1))}">'
        f"{label}</polyline>"
        for part in parts
        if part
    ]


def _marked(mark: Mark, frame: _Frame) -> str:
    y = frame.y(mark.value)
    return f'<line class="mark" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _ticks(frame: _Frame) -> list[tuple[float, str]]:
    if frame.log:
        stride = max(1, math.ceil((frame.high - frame.low) / (_NUM_TICKS + 1)))
        exponents = range(int(frame.low), int(frame.high) + 1, stride)
        return [(10.0**exponent, f"1e{exponent}") for exponent in exponents]
    rough = (frame.high - frame.low) / _NUM_TICKS
    decade = 10.0 ** math.floor(math.log10(rough))
    every = decade * next(nice for nice in (1, 2, 5, 10) if nice * decade >= 0.999 * rough)
    first, last = math.ceil(frame.low / every), math.floor(frame.high / every)
    digits = max(0, -math.floor(math.log10(every)))
    largest = max(abs(frame.low), abs(frame.high))
    if 1e-3 <= largest < 1e6:
        return [(k * every, f"{k * every:,.{digits}f}") for k in range(first, last + 1)]
    return [(k * every, f"{k * every:.3g}") for k in range(first, last + 1)]
