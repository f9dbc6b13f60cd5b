"""Entries of `log.loggers`: a name, or a name with the options of its library."""

from __future__ import annotations

from typing import Any

from dtrain import catalog
from dtrain.job.located import did_you_mean
from dtrain.job.units import found

LoggerEntry = str | dict[str, dict[str, Any]]
"""`tensorboard`, or `mlflow: {experiment: digits}`."""

LOGGER_SCHEMA = {
    "anyOf": [
        {"type": "string", "enum": list(catalog.LOGGERS)},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": "object"},
        },
    ]
}


def checked_logger(value: Any) -> Any:
    """The entry as it is.

    Raises:
        ValueError: it is neither of the two forms, or names no logger; says what is known.
    """
    known = catalog.names("logger")
    name = next(iter(value)) if isinstance(value, dict) and len(value) == 1 else value
    if not isinstance(name, str):
        raise ValueError(
            f"expected a logger's name, or one name with its options; found {found(value)}"
        )
    if name not in known:
        near = did_you_mean(name, known)
        raise ValueError(f"there is no logger {name!r}; known: {', '.join(known)}{near}")
    if isinstance(value, dict) and not isinstance(value[name], dict):
        raise ValueError(f"expected options of {name} as `name: value`; found {found(value[name])}")
    return value


def split_entry(entry: LoggerEntry) -> tuple[str, dict[str, Any]]:
    """(name, options) of an entry."""
    if isinstance(entry, str):
        return entry, {}
    ((name, options),) = entry.items()
    return name, options
