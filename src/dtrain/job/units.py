"""Read numbers, durations, sizes and node counts, in the forms that users write.

Each `parse_*` takes a value from YAML or a flag and returns the parsed value. Otherwise it raises
`ValueError` with a sentence about what is allowed and what was found.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from pydantic_core import PydanticCustomError

from dtrain.errors import quoted

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_UNIT_WORDS = {
    "d": r"d|days?",
    "h": r"h|hrs?|hours?",
    "m": r"m|mins?|minutes?",
    "s": r"s|secs?|seconds?",
}
_MOST_DIGITS = 300  # a float holds no larger number
_MOST_SECONDS = 366 * 86400.0
_NUMBER = rf"[0-9]{{1,{_MOST_DIGITS}}}(?:\.[0-9]{{1,{_MOST_DIGITS}}})?"
_PARTS = re.compile(
    r"\s*".join(f"(?:(?P<{unit}>{_NUMBER})\\s*(?:{word}))?" for unit, word in _UNIT_WORDS.items())
)
_CLOCK = re.compile(
    r"(?:(?P<d>[0-9]{1,9})-)?(?:(?P<h>[0-9]{1,9}):)?(?P<m>[0-9]{1,9}):(?P<s>[0-9]{1,9})"
)

_SIZE = re.compile(rf"({_NUMBER})\s*([kmgt]?)(i?)b", re.IGNORECASE)
_BARE_SIZE = re.compile(rf"({_NUMBER})\s*([kmgt])i?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class WrongTypeError(ValueError):
    """An error for a value of the wrong type, for example text where a number is needed."""


def found(value: Any) -> str:
    """Describe a value for a message: `the number 3`, `the text 'abc'`, `a list`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        digits = str(value)
        return f"the number {digits if len(digits) <= 40 else digits[:37] + '...'}"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    return "a list" if isinstance(value, list | tuple) else "a section"


def is_number(text: str) -> bool:
    """Return whether `int` accepts a text as a number from 0 on: ASCII digits, not too many."""
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def parse_whole(value: Any) -> int:
    """Return a whole number; `1e4` is one, `yes` and `"4"` are not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise WrongTypeError(f"expected a whole number; found {found(value)}")


def parse_real(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise WrongTypeError(f"expected a number; found {found(value)}")


def parse_duration(value: Any) -> float:
    """Return seconds, from a number of seconds or `90s`, `30m`, `2h`, `1d`, `1h30m`, `01:30:00`."""
    seconds = _seconds(value)
    if seconds > _MOST_SECONDS:
        raise ValueError(f"expected a duration of at most a year; found {found(value)}")
    return seconds


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    if re.fullmatch(_NUMBER, text):
        return float(text)
    match = _CLOCK.fullmatch(text) or _PARTS.fullmatch(text)
    if not text or match is None or not _clock_fits(match, text):
        raise ValueError(
            "expected a duration: seconds, or for example 90s, 30m, 2h, 1d, 1h30m, 01:30:00; "
            f"found {found(value)}"
        )
    return float(sum(_SECONDS[unit] * Decimal(n) for unit, n in match.groupdict().items() if n))


def _clock_fits(match: re.Match[str], text: str) -> bool:
    """Return whether all parts of `h:mm:ss` after the first are below 60 (hours of days below
    24)."""
    if ":" not in text:
        return True
    parts = [(unit, int(n)) for unit, n in match.groupdict().items() if n]
    return all(n < (24 if unit == "h" else 60) for unit, n in parts[1:])


def parse_size(value: Any) -> int:
    """Return bytes, from a number of bytes or `512MB` (decimal), `4GiB` (binary)."""
    if not isinstance(value, str):
        try:
            return parse_whole(value)
        except ValueError:
            pass
    text = value.strip() if isinstance(value, str) else ""
    if bare := _BARE_SIZE.fullmatch(text):
        number, prefix = bare[1], bare[2].upper()
        raise ValueError(
            f"{text!r} may mean two sizes; write {number}{prefix}B (powers of 1000) "
            f"or {number}{prefix}iB (powers of 1024)"
        )
    if match := _SIZE.fullmatch(text):
        size = Decimal(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
        if size == int(size):
            return int(size)
    elif is_number(text):
        return int(text)
    raise ValueError(
        f"expected a size: bytes, or for example 512MB, 16GB, 4GiB; found {found(value)}"
    )


def parse_nodes(value: Any) -> tuple[int, int]:
    """Return (min, max) nodes, from `2`, `"2"`, `2:4` or `[2, 4]`.

    YAML 1.1 reads a bare `2:4` as 124 (base 60). The job loader reads it as text instead.
    """
    return _range(value, "a number of nodes, or min:max, for example 2:4", "min:max")


def parse_steps(value: Any) -> tuple[int, int]:
    """Return (first, last) step, from `10`, `10:15` or `[10, 15]`."""
    return _range(value, "a step, or first:last, for example 10:15", "first:last")


def _range(value: Any, expected: str, meaning: str) -> tuple[int, int]:
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*(:\s*[0-9]{1,9}\s*)?", value):
        parts = [int(part) for part in value.split(":")]
    elif isinstance(value, list | tuple) and len(value) == 2:
        parts = [parse_whole(part) for part in value]
    else:
        try:
            parts = [parse_whole(value)]
        except ValueError:
            raise ValueError(f"expected {expected}; found {found(value)}") from None
    low, high = parts[0], parts[-1]
    if low > high:
        raise ValueError(f"{low}:{high} means {meaning}, and {low} is more than {high}")
    return low, high


def refuse_yaml_boolean(value: Any) -> Any:
    """Return text unchanged, and refuse a boolean. YAML makes one of a bare `yes`, `no`, `on`,
    `off`."""
    if isinstance(value, bool):
        raise PydanticCustomError(
            "string_type",
            "expected text; found {found}: YAML reads a bare yes, no, on, off, true, false as a "
            'boolean, so put it in quotes: "no"',
            {"found": found(value)},
        )
    return value
