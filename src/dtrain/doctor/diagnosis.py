"""The outcome of a check, and its lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dtrain import checked
from dtrain.words import counted

Status = Literal["ok", "warning", "problem"]
OK: Status = "ok"
WARNING: Status = "warning"
PROBLEM: Status = "problem"
SEVERITY: Mapping[Status, int] = {OK: 0, WARNING: 1, PROBLEM: 2}
_COLOURS: Mapping[str, str] = {OK: "green", WARNING: "yellow", PROBLEM: "red"}

CHECK_CODES: Mapping[str, str] = {
    "plan": "doctor.plan",
    "versions": "doctor.versions",
    "torch": "doctor.torch",
    "task": "doctor.task",
    "code": "doctor.code",
    "data": "doctor.data",
    "cores": "doctor.cores",
    "numa": "doctor.numa",
    "gpus": "doctor.gpus",
    "driver": "doctor.driver",
    "shm": "doctor.shm",
    "ulimits": "doctor.ulimits",
    "disk": "doctor.disk",
    "fsync": "doctor.fsync",
    "shared": "doctor.shared",
    "names": "doctor.names",
    "interface": "doctor.interface",
    "ports": "doctor.ports",
    "clock": "doctor.clock",
    "slurm": "doctor.slurm",
    "ray": "doctor.ray",
    "answer": "doctor.answer",
}
"""Each check, in the order in which results are shown, and the code of what it finds."""

_INDENT = 8 + 1 + 10


@dataclass(frozen=True)
class Diagnosis:
    """What one check found."""

    __pydantic_config__ = checked.CONFIG

    check: checked.Name
    """The name of the check, of `CHECK_CODES`."""
    status: Status
    fact: checked.Text
    """What was measured."""
    remedy: checked.Text = ""
    """For a warning or a problem: the command or the edit that mends it."""
    code: checked.Text = ""
    """For a warning or a problem: the stable name, as in docs/errors.md."""

    def __post_init__(self) -> None:
        if not self.code and self.status != OK:
            object.__setattr__(self, "code", CHECK_CODES[self.check])


def worst(diagnoses: Iterable[Diagnosis]) -> Status:
    """Return the worst status of several diagnoses."""
    return max((each.status for each in diagnoses), key=SEVERITY.__getitem__, default=OK)


def lines(
    diagnosis: Diagnosis,
    width: int | None,
    paint: Callable[[str, str | None], str] = lambda text, _colour: text,
) -> list[str]:
    """Return the lines for people.

    Args:
        diagnosis: what a check found.
        width: the columns to which lines are folded. None means that they are not folded.
        paint: a function that gives a text a colour.
    """
    head = f"{diagnosis.status:<8} {diagnosis.check:<10}"
    code = f"  [{diagnosis.code}]" if diagnosis.code else ""
    first, *rest = _folded(diagnosis.fact + code, " " * _INDENT, width)
    found = [head + first[_INDENT:], *rest]
    if code:
        found[-1] = found[-1].replace(code.strip(), paint(code.strip(), "dim"))
    if diagnosis.remedy:
        found += _folded(f"try: {diagnosis.remedy}", " " * _INDENT, width)
    colour = _COLOURS.get(diagnosis.status)
    found[0] = paint(diagnosis.status, colour) + found[0].removeprefix(diagnosis.status)
    return found


def summary(diagnoses: list[Diagnosis]) -> str:
    """Return the last line: how many checks found what."""
    count = {status: sum(each.status == status for each in diagnoses) for status in SEVERITY}
    bad = [counted(count[status], status) for status in (PROBLEM, WARNING) if count[status]]
    return f"{counted(len(diagnoses), 'check')}: {', '.join(bad) or 'no problem'}"


def _folded(text: str, indent: str, width: int | None) -> list[str]:
    parts = text.splitlines() or [""]
    if width is None:
        return [indent + part for part in parts]
    return [
        line
        for part in parts
        for line in textwrap.wrap(
            part,
            max(60, width),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
