"""Which runs are wanted, and in which order."""

from __future__ import annotations

import math
import operator
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

from dtrain.errors import UsageError, quoted
from dtrain.job.located import did_you_mean
from dtrain.run.attempts import DAMAGED, State
from dtrain.searching import fields
from dtrain.searching.index import Entry

STATES = (*get_args(State), DAMAGED)
_OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")


@dataclass(frozen=True)
class Condition:
    """A condition such as `args.lr<0.01`."""

    name: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition.

        Raises:
            UsageError: it is none.
        """
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise UsageError(
                f"expected a condition such as 'train.loss<0.1' or 'seed=3'; found {quoted(text)}. "
                "Write it in quotes: a shell redirects at < and >",
                code="usage.where-syntax",
            )
        condition = cls(*found.groups())
        if condition.operator[0] in "<>" and _number(condition.value) is None:
            raise UsageError(
                f"{condition.operator} compares numbers, and {quoted(condition.value)} is none",
                code="usage.where-syntax",
            )
        return condition

    def holds(self, entry: Entry) -> bool:
        """Return whether it holds for a run. It does not for a run without such a value."""
        known = fields.value(entry, self.name)
        if known is None:
            return False
        compare, wanted = _OPERATORS[self.operator], _number(self.value)
        if wanted is not None and _is_number(known):
            return bool(compare(known, wanted))
        return self.operator[0] not in "<>" and bool(compare(as_text(known), self.value))


def as_text(value: Any) -> str:
    """Return a value as it is written in a job file."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(as_text, value)) if isinstance(value, list) else str(value)


def checked_states(texts: Iterable[str]) -> list[str]:
    """Return the states in texts such as `failed,lost`.

    Raises:
        UsageError: there is no such state.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    for name in names:
        if name not in STATES:
            near = did_you_mean(name, list(STATES))
            raise UsageError(
                f"there is no state {quoted(name)}; known: {', '.join(STATES)}{near}",
                code="usage.invalid-value",
            )
    return names


def time_of(text: str) -> float:
    """Return the time that a text means, in seconds since the epoch.

    Args:
        text: a date, `2026-11-30` or `2026-11-30 14:00`, or the time that has passed since, `2d`.

    Raises:
        UsageError: it means none.
    """
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError):
        pass
    try:
        return time.time() - seconds_of(text)
    except UsageError as error:
        raise UsageError(
            f"{error}; or give a date, 2026-11-30", code="usage.invalid-value"
        ) from None


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as `2d`, of at most a year.

    Raises:
        UsageError: it is none.
    """
    from dtrain.job.units import parse_duration

    try:
        if not text.strip().isdecimal():  # 30 may mean days or minutes
            return parse_duration(text)
    except ValueError:
        pass
    raise UsageError(
        f"expected a duration of at most a year, such as 30m, 12h or 2d; found {quoted(text)}",
        code="usage.invalid-value",
    )


def select(
    found: Sequence[Entry],
    *,
    states: Iterable[str] = (),
    since: str | None = None,
    where: Iterable[str] = (),
    sort: str | None = None,
    reverse: bool = False,
    last: int | None = None,
) -> list[Entry]:
    """Return the runs that match, in order.

    Args:
        found: all runs, the oldest first.
        states: the states of wanted runs. None means any.
        since: a date or a duration: only runs that were started since then.
        where: conditions, for example `args.lr<0.01`. All must hold.
        sort: the name of a column, a field or a metric. With a `-` before it, the largest value
            comes first. Runs without a value come last.
        reverse: whether to reverse the order.
        last: how many at most, the newest ones.

    Raises:
        UsageError: a state, a date or a condition is none, or a name is unknown.
    """
    conditions = [Condition.parse(text) for text in where]
    wanted = checked_states(states)
    name = None if sort is None else sort.removeprefix("-")
    fields.check([*(each.name for each in conditions), *([] if name is None else [name])], found)
    begin = None if since is None else time_of(since)
    chosen = [
        entry
        for entry in found
        if (not wanted or entry.row["state"] in wanted)
        and (begin is None or started(entry) >= begin)
        and all(each.holds(entry) for each in conditions)
    ]
    if last is not None:
        chosen = chosen[len(chosen) - min(last, len(chosen)) :]
    if name is None:
        return chosen[::-1] if reverse else chosen
    keys = {entry.run.id: _sort_key(fields.value(entry, name)) for entry in chosen}
    having = [entry for entry in chosen if keys[entry.run.id] is not None]
    others = [entry for entry in chosen if keys[entry.run.id] is None]
    descending = reverse != (sort != name)
    return sorted(having, key=lambda entry: keys[entry.run.id], reverse=descending) + others


def started(entry: Entry) -> float:
    """Return when a run was started, or else when its job was written."""
    known = entry.row.get("started")
    if isinstance(known, int | float):
        return known
    try:
        return entry.run.resolved.stat().st_mtime
    except OSError:
        return 0.0


def _sort_key(value: Any) -> Any:
    """Return what orders a value: numbers come before texts."""
    if value is None:
        return None
    return (0, value, "") if _is_number(value) else (1, 0, as_text(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number
