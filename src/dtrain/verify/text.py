"""The report for a terminal: a table that is written row by row, then what is wrong and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from dtrain.verify.judge import Result
from dtrain.verify.pairs import Pair
from dtrain.verify.report import Report

LEVELS = (
    "L0 same samples",
    "L1 same in fp64",
    "L2 same up to the last digits of fp32",
    "L3 same bits",
)
_HEADS = ("pair", "level", "largest", "first difference", "verdict")

Paint = Callable[[str, str], str]
"""(text, colour) → text."""


def plain(text: str, _colour: str) -> str:
    """No colours."""
    return text


class Table:
    """Rows of a width known beforehand, so that each can be shown as soon as it is there."""

    def __init__(self, pairs: Sequence[Pair], width: int, paint: Paint = plain) -> None:
        """Lay out.

        Args:
            pairs: all that will have a row.
            width: columns of the terminal.
            paint: how a verdict gets its colour.
        """
        self._paint = paint
        name = max([len(_HEADS[0]), *(len(pair.name) for pair in pairs)])
        fixed = name + len(_HEADS[1]) + 8 + len("same w/o dropout") + 2 * 4
        where = max(len(_HEADS[3]), min(48, width - fixed))
        self._widths = (name, len(_HEADS[1]), 8, where)

    def head(self) -> str:
        """The line above the rows."""
        return self._line([*_HEADS])

    def waiting(self, pair: Pair) -> str:
        """Instead of a row, while the pair runs."""
        return f"{pair.name.ljust(self._widths[0])}  …"

    def row(self, result: Result) -> str:
        """The row of a pair."""
        text, colour = verdict_of(result)
        largest = "-" if result.largest is None else number(result.largest.value)
        cells = [result.pair.name, result.level or "-", largest, where(result)]
        return self._line([*cells, self._paint(text, colour)])

    def _line(self, cells: list[str]) -> str:
        padded = [
            _cut(cell, width).ljust(width) for cell, width in zip(cells, self._widths, strict=False)
        ]
        return "  ".join([*padded, cells[-1]]).rstrip()


def verdict_of(result: Result) -> tuple[str, str]:
    """(a few words, colour)."""
    if result.verdict == "failed":
        return "FAILED", "red"
    if result.verdict == "different":
        return "DIFFERENT", "red"
    if result.without_dropout:
        return "same w/o dropout", "yellow"
    text = "same" if result.verdict == "same" else "rounding"
    return (f"{text} = {result.bits_of}" if result.bits_of else text), "green"


def opening(report: Report) -> str:
    """What is about to be compared."""
    samples = "" if report.samples is None else f", epochs of {report.samples} samples"
    return f"{report.job}: {report.steps} steps{samples}; the reference is {report.reference}"


def closing(report: Report, width: int) -> str:
    """What the levels mean, what is wrong and why, and the sum of it."""
    blocks = ["\n".join(wrap("; ".join(LEVELS), width))]
    remarks = [remark(result) for result in report.results]
    blocks += [each.text(width) for each in remarks if each is not None]
    bad = [result for result in report.results if not result.passed]
    count = len(report.results)
    if not bad:
        blocks.append(f"all {count} are the same training" if count > 1 else "the same training")
    else:
        blocks.append(f"{len(bad)} of {count} are not the same training")
    return "\n\n".join(blocks)


def number(value: float) -> str:
    """A difference: `1.5e-07`, `0`, `inf`."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "inf"


def where(result: Result) -> str:
    """The first step and parameter that differ: beyond the tolerance, or at all."""
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
    """What there is to say about a pair besides its row."""

    headline: str
    details: dict[str, str] = field(default_factory=dict)
    raw: str = ""
    """Lines to be shown as they are."""

    def text(self, width: int) -> str:
        """For a terminal."""
        lines = wrap(self.headline, width)
        for label, value in self.details.items():
            first, *rest = wrap(value, max(40, width - 9))
            lines += [f"  {label:<6} {first}", *(f"         {line}" for line in rest)]
        return "\n".join([*lines, *(f"  {line}" for line in self.raw.splitlines())])


def remark(result: Result) -> Remark | None:
    """What there is to say about a pair; None where its row says it all."""
    name, finding = result.pair.name, result.finding
    if result.verdict == "failed":
        return Remark(f"{name} failed", raw=result.failure)
    if finding is not None:
        when = "from the start" if finding.step == 0 else f"from step {finding.step} on"
        details = {"broken": finding.clause, "found": finding.found, "likely": finding.likely}
        return Remark(
            f"{name} is a different training {when}",
            {label: value for label, value in details.items() if value},
            raw=result.failure,
        )
    if result.without_dropout:
        return Remark(
            f"{name} was compared with dropout off: in another layout the ranks draw other random "
            "numbers. Strategy 'exact' draws the same in every layout"
        )
    if result.verdict == "rounding":
        shrinks = result.shrinks or 0.0
        times = f"{shrinks:.0e} times" if math.isfinite(shrinks) else "to nothing"
        return Remark(f"{name} differs by rounding: in fp64 the difference shrinks {times}")
    return None


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
