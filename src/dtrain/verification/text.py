"""The report for a terminal: a table written row by row, then the errors and causes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from dtrain.verification.judge import Result
from dtrain.verification.layouts import Layout
from dtrain.verification.report import Report
from dtrain.verification.session import Progress, Session
from dtrain.words import counted, few

_LEVELS = (
    "L0 same samples",
    "L1 same in fp64",
    "L2 same up to the last digits of fp32",
    "L3 same bits",
)
_DEEP_LEVELS = ("L0 same samples", "L1 same in fp64", "L3 same bits in fp64")
_HEADS = ("layout", "level", "largest", "first difference", "verdict")

Paint = Callable[[str, str], str]
"""A function (text, colour) → text."""


def plain(text: str, _colour: str) -> str:
    return text


class Table:
    """A table whose width is known beforehand, so that each row can be shown at once."""

    def __init__(self, layouts: Sequence[Layout], width: int, paint: Paint = plain) -> None:
        """Lay out the columns.

        Args:
            layouts: all layouts that will have a row.
            width: columns of the terminal.
            paint: a function that colours a verdict.
        """
        self._paint = paint
        left = width - len(_HEADS[1]) - 8 - len("same, fixed noise") - 2 * 4
        longest = max([len(_HEADS[0]), *(len(layout.name) for layout in layouts)])
        name = min(longest, max(len(_HEADS[0]), left - len(_HEADS[3])))
        where = max(len(_HEADS[3]), min(48, left - name))
        self._widths = (name, len(_HEADS[1]), 8, where)

    def head(self) -> str:
        return self._line([*_HEADS])

    def row(self, result: Result) -> str:
        text, colour = verdict_of(result)
        largest = "-" if result.largest is None else number(result.largest.value)
        cells = [result.layout.name, result.level or "-", largest, where(result)]
        return self._line([*cells, self._paint(text, colour)])

    def _line(self, cells: list[str]) -> str:
        padded = [
            _cut(cell, width).ljust(width) for cell, width in zip(cells, self._widths, strict=False)
        ]
        return "  ".join([*padded, cells[-1]]).rstrip()


def waiting(progress: Progress, seconds: float, width: int) -> str:
    """Return the line below the rows while something runs: `row 3 of 11  ddp ×4  5 s`."""
    place = f"row {progress.row} of {progress.rows}" if progress.row else "reference"
    before, after = f"{place}  ", f"  {seconds:.0f} s"
    if progress.again:
        after = f"  {progress.again}{after}"
    return f"{before}{_cut(progress.layout, max(1, width - 1 - len(before + after)))}{after}"


def verdict_of(result: Result) -> tuple[str, str]:
    """Return (a few words, colour)."""
    if result.verdict == "failed":
        return "FAILED", "red"
    if result.verdict == "different":
        return "DIFFERENT", "red"
    text = "same" if result.verdict == "same" else "rounding"
    if result.fixed_noise:
        return f"{text}, fixed noise", "green"
    return (f"{text} = {result.bits_of}" if result.bits_of else text), "green"


def run_and_report(session: Session, width: int, paint: Paint = plain) -> Iterator[str]:
    """Run a session, and yield each part of its report as soon as it is known.

    Args:
        session: the session.
        width: the columns of the terminal. Texts take at most 100.
        paint: a function that colours a text.
    """
    table = Table(session.layouts, width, paint)
    session.begin()
    yield opening(session.report)
    yield f"\n{table.head()}"
    for result in session.results():
        yield table.row(result)
    yield f"\n{closing(session.report, min(width, 100))}"


def opening(report: Report) -> str:
    samples = "" if report.samples is None else f", epochs of {report.samples} samples"
    deep = " in fp64" if report.deep else ""
    return f"{report.job}: {report.steps} steps{deep}{samples}; the reference is {report.reference}"


def closing(report: Report, width: int) -> str:
    """Return the meaning of the levels, the errors and their causes, and the totals."""
    blocks = ["\n".join(wrap(levels(report), width))]
    blocks += [each.text(width) for each in remarks(report.results)]
    blocks += ["\n".join(wrap(each, width)) for each in left_out(report)]
    return "\n\n".join([*blocks, summary(report)])


def summary(report: Report) -> str:
    """Return whether all layouts are the same training, and how many are not."""
    bad, count = sum(not result.passed for result in report.results), len(report.results)
    if bad:
        return f"not the same training: {bad} of {counted(count, 'layout')}"
    same = f"all {count} layouts are" if count > 1 else "this layout is"
    return f"{same} the same training"


def levels(report: Report) -> str:
    return "; ".join(_DEEP_LEVELS if report.deep else _LEVELS)


def left_out(report: Report) -> list[str]:
    """Return a sentence for each reason why additional rows were left out."""
    by_reason: dict[str, list[str]] = {}
    for name, why in report.left_out.items():
        by_reason.setdefault(why, []).append(name)
    return [f"left out: {', '.join(names)} ({why})" for why, names in by_reason.items()]


def number(value: float) -> str:
    """Return a difference as text: `1.5e-07`, `0`, `inf`."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "inf"


def where(result: Result) -> str:
    """Return the first step and parameter that differ: beyond the tolerance, or at all."""
    if result.finding is not None:
        step, tensor = result.finding.step, result.finding.tensor
    elif result.first is not None:
        step, tensor = result.first.step, result.first.tensor or result.first.what
    else:
        return "-"
    place = "start" if step == 0 else f"step {step}"
    return f"{place} {tensor}".rstrip()


@dataclass(frozen=True)
class Remark:
    """A remark about a layout, in addition to its row."""

    headline: str
    details: dict[str, str] = field(default_factory=dict)
    raw: str = ""
    """Lines that are shown as they are."""
    code: str = ""
    """The code of the error."""

    def text(self, width: int) -> str:
        lines = wrap(f"{self.headline} [{self.code}]" if self.code else self.headline, width)
        for label, value in self.details.items():
            first, *rest = wrap(value, max(40, width - 16))
            lines += [f"  {label:<13} {first}", *(" " * 16 + line for line in rest)]
        return "\n".join([*lines, *(f"  {line}" for line in self.raw.splitlines())])


def remarks(results: Sequence[Result]) -> list[Remark]:
    """Return the remarks in addition to the rows. Pairs with one cause share a remark."""
    by_cause: dict[object, list[Result]] = {}
    for result in results:
        by_cause.setdefault(_cause(result), []).append(result)
    made = [_remark(group) for group in by_cause.values()]
    return [each for each in made if each is not None]


def _cause(result: Result) -> object:
    """Return a key that is equal for results with the same remark."""
    if result.verdict == "failed":
        return "failed", result.failure
    if result.finding is not None:
        return "different", result.finding.rule, result.finding.likely_cause
    if result.fixed_noise:
        return "noise"
    return result.verdict


def _remark(results: Sequence[Result]) -> Remark | None:
    first, names = results[0], few((each.layout.name for each in results), sep="; ")
    finding, one = first.finding, len(results) == 1
    if first.verdict == "failed":
        return Remark(f"{names} failed", code=first.code, raw=first.failure)
    if finding is not None:
        step = min(result.finding.step for result in results if result.finding is not None)
        when = "from the start" if step == 0 else f"from step {step} on"
        which = "is a different training" if one else "are different trainings"
        details = {
            "broken rule": finding.rule,
            "observation": finding.observation,
            "likely cause": finding.likely_cause,
        }
        return Remark(
            f"{names} {which} {when}",
            {label: value for label, value in details.items() if value},
            code=first.code,
            raw=first.failure,
        )
    if first.fixed_noise:
        was = "was" if one else "were"
        where = f" ({', '.join(first.draws[:3])})" if first.draws else ""
        return Remark(
            f"{names} {was} compared with fixed noise: there is no dropout, and the random numbers "
            f"of loss(){where} depend only on the sample. In another layout the ranks draw other "
            "numbers, which is not a mistake. Strategy 'exact' draws the same in every layout"
        )
    if first.verdict == "rounding":
        shrinks = min(result.shrinks or 0.0 for result in results)
        size = f"{shrinks:.0e} times smaller" if math.isfinite(shrinks) else "0"
        differ = "differs" if one else "differ"
        return Remark(f"{names} {differ} only by rounding: in fp64 the difference is {size}")
    return None


def _cut(text: str, width: int) -> str:
    """Return a layout's or parameter's name, cut in the middle so that both ends fit a cell."""
    if len(text) <= width:
        return text
    return f"{text[: width // 2]}…{text[len(text) - (width - 1) // 2 :]}"[:width]
