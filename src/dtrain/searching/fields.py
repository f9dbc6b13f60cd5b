"""The names of what is known of a run: columns, fields of its job, and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dtrain.errors import UsageError, quoted
from dtrain.job.located import did_you_mean
from dtrain.searching.index import SPLITS, Entry

COLUMNS = {
    "run": "id",
    "state": "state",
    "step": "step",
    "ranks": "world_size",
    "strategy": "strategy",
    "launcher": "launcher",
    "started": "started",
    "duration": "duration",
    "metric": "metric",
    "set": "set",
}
"""The columns of `dtrain runs`, in lower case, and the names of their values."""
_HAS_A_COLUMN = (
    "name",
    "strategy",
    "launch.nodes",
    "launch.procs_per_node",
    "launch.gpus_per_node",
)


def metric_of(row: dict[str, Any]) -> tuple[str, float] | None:
    """Return the metric that column METRIC shows: the first of the evaluation, or the loss."""
    last = row.get("eval") or {k: v for k, v in row.get("train", {}).items() if k == "loss"}
    name, value = next(iter(last.items()), (None, None))
    return None if name is None else (name, math.nan if value is None else value)  # as in JSON


def set_of(row: dict[str, Any]) -> str | None:
    """Return the fields that flags have set and that no column shows, as column SET has them."""
    given = row.get("set", {}).items()
    return " ".join(f"{k}={v}" for k, v in given if k not in _HAS_A_COLUMN) or None


def value(entry: Entry, name: str) -> Any:
    """Return what a run has under a name. None if it has nothing.

    A field of the job comes before a metric of the same name.
    """
    key, row = COLUMNS.get(name.lower(), name), entry.row
    if key == "metric":
        metric = metric_of(row)
        return None if metric is None else metric[1]
    if key == "set":
        return set_of(row)
    if key in row and key not in SPLITS:
        return row[key]
    known = entry.job.get(name)
    split, _, metric_name = name.partition(".")
    if known is None and split in SPLITS:
        known = row.get(split, {}).get(metric_name)
    return known


def check(names: Iterable[str], found: Sequence[Entry]) -> None:
    """Check that there is something under each name, in some run or in every job.

    Raises:
        UsageError: there is nothing. The error names the nearest name that is known.
    """
    unknown = [name for name in names if not any(_has(entry, name) for entry in found)]
    if not found or not unknown:
        return
    from dtrain.job.errors import fields_of, model_at
    from dtrain.job.located import dotted
    from dtrain.job.spec import JobSpec

    leaves = (keys for keys in fields_of(JobSpec) if model_at(JobSpec, keys) is None)
    of_jobs = {dotted(keys) for keys in leaves}
    for name in unknown:
        if name not in of_jobs:
            near = _nearest(name, sorted(of_jobs | set(known(found))))
            text = f"no run has a column, a field or a metric {quoted(name)}{near}"
            raise UsageError(text, code="usage.unknown-name")


def known(found: Iterable[Entry]) -> list[str]:
    """Return all names under which these runs have a value."""
    names = dict.fromkeys(COLUMNS)
    for entry in found:
        names |= dict.fromkeys(key for key in entry.row if key not in SPLITS)
        names |= dict.fromkeys(entry.job)
        names |= {f"{split}.{key}": None for split in SPLITS for key in entry.row.get(split, ())}
    return list(names)


def _has(entry: Entry, name: str) -> bool:
    split, _, metric = name.partition(".")
    return (
        name.lower() in COLUMNS
        or name in entry.job
        or (name in entry.row and name not in SPLITS)
        or metric in (entry.row.get(split) or {} if split in SPLITS else {})
    )


def _nearest(name: str, names: list[str]) -> str:
    """Return a hint at a name that is similar, or ends like the unknown one: `eval.accuracy`."""
    ends = [each for each in names if each.endswith(f".{name}")]
    return did_you_mean(name, names) or (f"; did you mean {ends[0]!r}?" if ends else "")
