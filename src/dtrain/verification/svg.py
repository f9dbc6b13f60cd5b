"""Line charts as inline SVG, without scripts, fonts or files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 26


@dataclass(frozen=True)
class Line:
    label: str
    values: Sequence[float | None]
    """The values at x = 1, 2, …; None leaves a gap."""
    style: str
    """The CSS class."""


@dataclass(frozen=True)
class Mark:
    label: str
    value: float


@dataclass(frozen=True)
class _Frame:
    """The positions of values in the chart, in SVG units."""

    width: int
    height: int
    steps: int
    low: float
    high: float
    log: bool

    def x(self, step: int) -> float:
        span = max(1, self.steps - 1)
        return _LEFT + (step - 1) * (self.width - _LEFT - _RIGHT) / span

    def y(self, value: float) -> float:
        share = (self.scaled(value) - self.low) / (self.high - self.low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    width: int = 320,
    height: int = 180,
    log: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """Return the chart as an `<svg>` element. With `log`, values of 0 or less are left out."""
    frame = _frame(lines, width, height, log, marks)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{escape(title)}</title>",
        *_axes(frame),
    ]
    for mark in marks:
        y = frame.y(mark.value)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/>')  # fmt: skip
        parts.append(
            f'<text x="{width - _RIGHT}" y="{y - 3:.1f}" class="right">{escape(mark.label)}</text>'
        )
    for line in lines:
        parts += _curve(line, frame)
    return "".join([*parts, "</svg>"])


def _frame(
    lines: Sequence[Line], width: int, height: int, log: bool, marks: Sequence[Mark]
) -> _Frame:
    values = [v for line in lines for v in line.values if _fits(v, log)]
    values += [mark.value for mark in marks]
    scaled = [math.log10(v) if log else v for v in values if v is not None] or [0.0]
    low, high = min(scaled), max(scaled)
    if log:
        low, high = math.floor(low), math.floor(high) + 1
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    margin = 0.0 if log else 0.05 * (high - low)
    steps = max([1, *(len(line.values) for line in lines)])
    return _Frame(width, height, steps, low - margin, high + margin, log)


def _fits(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _curve(line: Line, frame: _Frame) -> list[str]:
    points = [
        (frame.x(step), frame.y(value))
        for step, value in enumerate(line.values, 1)
        if value is not None and _fits(value, frame.log)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    label = f"<title>{escape(line.label)}</title>"
    dots = [
        f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.2">{label}</circle>'
        for x, y in points
    ]
    return [f'<polyline class="{line.style}" points="{path}">{label}</polyline>', *dots]


def _axes(frame: _Frame) -> list[str]:
    bottom = frame.height - _BOTTOM
    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    ]
    for value, text in _ticks(frame):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{frame.width - _RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="right" x="{_LEFT - 6}" y="{y + 4:.1f}">{text}</text>'
        )
    every = max(1, frame.steps // 10)
    for step in range(1, frame.steps + 1, every):
        parts.append(
            f'<text class="middle" x="{frame.x(step):.1f}" y="{bottom + 16}">{step}</text>'
        )
    return parts


def _ticks(frame: _Frame) -> list[tuple[float, str]]:
    if frame.log:
        stride = max(1, math.ceil((frame.high - frame.low) / 5))
        exponents = range(int(frame.low), int(frame.high) + 1, stride)
        return [(10.0**exponent, f"1e{exponent}") for exponent in exponents]
    rough = (frame.high - frame.low) / 4
    decade = 10.0 ** math.floor(math.log10(rough))
    every = decade * next(nice for nice in (1, 2, 5, 10) if nice * decade >= rough)
    first, last = math.ceil(frame.low / every), math.floor(frame.high / every)
    digits = max(0, -math.floor(math.log10(every)))
    return [(k * every, f"{k * every:.{digits}f}") for k in range(first, last + 1)]
