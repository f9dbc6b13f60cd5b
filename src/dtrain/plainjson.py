"""Strict JSON, which every reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON: NaN and infinity become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(line: Any) -> dict[str, float]:
    """Return the numbers of an object as they were before `to_json`: null becomes NaN again."""
    found: dict[str, float] = {}
    for name, value in line.items() if isinstance(line, Mapping) else ():
        if isinstance(value, float):
            found[name] = value
        elif value is None:
            found[name] = math.nan
        elif isinstance(value, int):
            found[name] = _float(value)
    return found


def _float(value: float) -> float:
    try:
        float(value)
    except OverflowError:  # for example an integer of 400 digits
        return math.inf if value > 0 else -math.inf
    return value
