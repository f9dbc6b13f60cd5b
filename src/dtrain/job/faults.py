"""Faults that are injected on purpose: `rank=1,step=5,kind=flip-gradient-bit,param=first.weight`.

This module parses them, without knowledge of the training. `train.faults` injects them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dtrain.job.located import FieldProblem
from dtrain.job.units import is_number

TENSOR_KINDS: Mapping[str, str] = {
    "flip-gradient-bit": "one bit of the reduced gradient",
    "flip-parameter-bit": "one bit of a parameter, after the step",
    "flip-moment-bit": "one bit of the optimizer's state of a parameter, after the step",
    "flip-buffer-bit": "one bit of a buffer, after the step",
    "scale-gradient": "the reduced gradient of a parameter, times 1 + 1e-6",
    "scale-parameter": "a parameter, times 1 + 1e-6",
    "scale-moment": "the optimizer's state of a parameter, times 1 + 1e-6",
    "scale-buffer": "a buffer, times 1 + 1e-6",
    "swap-gradient-elements": "two elements of the reduced gradient change places",
    "swap-parameter-elements": "two elements of a parameter change places",
    "swap-moment-elements": "two elements of the optimizer's state change places",
    "swap-buffer-elements": "two elements of a buffer change places",
}
OTHER_KINDS: Mapping[str, str] = {
    "nan-loss": "the loss of the rank's first micro-batch is NaN",
    "nan-gradient": "the rank's own gradient of a parameter is NaN, before it is reduced",
    "skip-collective": "a collective that the task calls is left out",
    "swap-collectives": "two collectives that the task calls change places",
    "duplicate-sample": "the rank reads its first sample of the step instead of its last",
    "drop-sample": "the rank does not read its last sample of the step",
    "lr": "the rank's learning rate is 10 % larger",
    "seed": "the rank has another seed, from the start",
}
KINDS: Mapping[str, str] = {**TENSOR_KINDS, **OTHER_KINDS}


@dataclass(frozen=True)
class Injection:
    kind: str
    rank: int
    step: int = 1
    """The optimizer step, counted from 1."""
    param: str | None = None
    """The name of a parameter or buffer. None means the first."""
    element: int = 0
    """The index of the element, counted row by row. A swap also takes the next element."""
    bit: int | None = None
    """The index of the bit in the element, from the lowest. None means the highest bit of the
    mantissa, in the first nonzero element from `element` on."""

    @property
    def action(self) -> str:
        """The action of a fault in a tensor: `flip`, `scale` or `swap`."""
        return self.kind.split("-")[0]

    @property
    def target(self) -> str:
        """The target of a fault in a tensor: `gradient`, `parameter`, `moment` or `buffer`."""
        return self.kind.split("-")[1]


def parse_injection(text: str) -> Injection:
    """Parse a text of the form `rank=1,step=5,kind=…`.

    Raises:
        ValueError: the text is wrong; the message explains why.
    """
    fields: dict[str, str | int] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{part!r} is not NAME=VALUE; write rank=1,step=5,kind=nan-loss")
        if name not in Injection.__dataclass_fields__:
            raise ValueError(f"{name!r} is unknown; known: {', '.join(_FIELDS)}")
        fields[name] = value if name in ("kind", "param") else _number(name, value)
    missing = [name for name in ("kind", "rank") if name not in fields]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; write rank=1,step=5,kind=nan-loss")
    kind = str(fields["kind"])
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kind {kind!r} is unknown; known: {', '.join(KINDS)}{hint}")
    if fields.get("step", 1) == 0:
        raise ValueError("steps are counted from 1")
    return Injection(**fields)  # type: ignore[arg-type]


def late_faults(job: Mapping[str, Any]) -> list[FieldProblem]:
    """Return a problem for each fault in a step that the training does not have."""
    train, checks = job["train"], job.get("checks")
    steps, texts = train.get("steps"), checks.get("inject") if isinstance(checks, Mapping) else None
    problems: list[FieldProblem] = []
    for text in texts if isinstance(steps, int) and isinstance(texts, list) else []:
        with contextlib.suppress(ValueError, AttributeError):  # reported where the field is checked
            fault = parse_injection(text)
            if fault.step > steps:
                why = f"{fault.kind} in step {fault.step}: the last is {steps}, of train.steps"
                problems.append((("checks", "inject"), why, "job.fault-after-the-end"))
    return problems


def absent_rank(texts: Iterable[str], world_size: int) -> str | None:
    """Return the problem with faults on ranks that will not exist, or None."""
    for fault in map(parse_injection, texts):
        if fault.rank >= world_size:
            ranks = f"{world_size} ranks, 0 to {world_size - 1}" if world_size > 1 else "rank 0"
            return f"{fault.kind} on rank {fault.rank}: there will be only {ranks}"
    return None


_FIELDS = tuple(Injection.__dataclass_fields__)


def _number(name: str, value: str) -> int:
    if not is_number(value):
        raise ValueError(f"{name}={value[:60]} is not a whole number from 0 on")
    return int(value)
