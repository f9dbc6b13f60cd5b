"""What differs between runs, as text."""

from __future__ import annotations

from typing import Any

from dtrain.comparing.losses import Difference, Parting
from dtrain.searching.query import as_text
from dtrain.words import counted


def value_text(name: str, value: Any) -> str:
    """Return a value that differs. A commit is shortened, and a missing value is `-`."""
    if value is None:
        return "-"
    if name == "commit":
        return str(value)[:12]
    return f"{value:.9g}" if isinstance(value, float) else as_text(value)


def parting_text(found: Parting, first: str) -> str:
    """Return where the losses of a run part from those of the first one.

    Args:
        found: the comparison of their losses.
        first: the id of the first run.
    """
    text, steps = f"losses of {first} and {found.run}: ", counted(found.steps, "logged step")
    if found.steps == 0:
        return f"{text}no logged step in common"
    if found.first is None:
        return f"{text}the same bits in {steps}"
    if found.beyond_rounding is None:
        return f"{text}other bits from {_at(found.first)} on, within rounding in {steps}"
    text += f"they part at {_at(found.beyond_rounding)}"
    if found.first.step < found.beyond_rounding.step:
        text += f"; other bits from step {found.first.step} on"
    return f"{text}; {steps} in common"


def _at(found: Difference) -> str:
    one, other = found.losses
    return f"step {found.step} ({one!r} and {other!r}, relative {found.relative:.2g})"
