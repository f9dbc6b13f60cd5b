"""The types of values in job.yaml, with the spellings that users may write."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from dtrain import catalog
from dtrain.environ import HASH_SEED
from dtrain.job.faults import parse_injection
from dtrain.job.located import did_you_mean
from dtrain.job.units import (
    found,
    is_number,
    parse_duration,
    parse_real,
    parse_size,
    parse_whole,
    refuse_yaml_boolean,
)
from dtrain.run.ids import LONGEST

_MOST = 10**15
"""The maximum of every counted value. Even 64-bit integers and floats represent it exactly."""
_MOST_PROCESSES = 10_000

Duration = Annotated[
    float,
    Field(gt=0, json_schema_extra={"type": ["number", "string"], "examples": ["90s", "30m", "2h"]}),
    BeforeValidator(parse_duration),
]
"""A duration in seconds, written as a number of seconds or `90s`, `30m`, `2h`, `1d`, `1h30m`,
`01:30:00`."""

Size = Annotated[
    int,
    Field(
        ge=0,
        le=_MOST,
        json_schema_extra={"type": ["integer", "string"], "examples": ["512MB", "16GB"]},
    ),
    BeforeValidator(parse_size),
]
"""A size in bytes, written as a number of bytes or `512MB`, `16GB`, `4GiB`."""

Text = Annotated[str, BeforeValidator(refuse_yaml_boolean)]
"""A string. The error explains when YAML has read `yes`, `no`, `on`, `off` as a boolean."""


def _checked_title(value: str) -> str:
    if not value.isprintable() or len(value.encode(errors="replace")) > LONGEST:
        raise ValueError(
            f"expected one line of printable text, of {LONGEST} bytes at most; found {found(value)}"
        )
    return value


Name = Annotated[
    str, Field(min_length=1), BeforeValidator(refuse_yaml_boolean), AfterValidator(_checked_title)
]
"""A nonempty line of text."""

EnvText = Annotated[Text, WithJsonSchema({"type": ["string", "number"]})]
"""The value of an environment variable. The job loader keeps a bare number letter by letter."""


def _checked_name(value: Any) -> Any:
    if isinstance(value, str) and (not value or set(value) & set("=\0")):
        raise ValueError(f"a variable's name is some text without `=`; found {value!r}")
    return value


EnvName = Annotated[str, BeforeValidator(_checked_name)]
"""The name of an environment variable."""


def _checked_hash_seed(env: dict[str, str]) -> dict[str, str]:
    value = env.get(HASH_SEED, "0")
    if not is_number(value) or int(value) >= 2**32:
        raise ValueError(
            f"{HASH_SEED} is a number below 2**32, the same in all processes of a run; "
            f"found {value!r}"
        )
    return env


Environment = Annotated[dict[EnvName, EnvText], AfterValidator(_checked_hash_seed)]
"""The environment variables of all workers."""


def _checked_injection(value: Any) -> Any:
    if isinstance(value, str):
        parse_injection(value)
    return value


InjectionText = Annotated[str, BeforeValidator(_checked_injection)]
"""A fault, for example `rank=1,step=5,kind=flip-gradient-bit,param=first.weight`. See
`dtrain.job.faults`."""

Natural = Annotated[int, Field(ge=0, le=_MOST), BeforeValidator(parse_whole)]
Count = Annotated[int, Field(ge=1, le=_MOST), BeforeValidator(parse_whole)]
FewOrZero = Annotated[int, Field(ge=0, le=_MOST_PROCESSES), BeforeValidator(parse_whole)]
Few = Annotated[int, Field(ge=1, le=_MOST_PROCESSES), BeforeValidator(parse_whole)]
"""The number of nodes, or of processes on a node, up to the largest that dtrain supports."""
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(parse_whole)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(parse_real)]
Share = Annotated[float, Field(ge=0, le=0.9), BeforeValidator(parse_real)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(parse_real)]


def _checked_logger(value: Any) -> Any:
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


_LOGGER_SCHEMA = {
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

LoggerEntry = Annotated[
    str | dict[str, dict[str, Any]],
    BeforeValidator(_checked_logger),
    WithJsonSchema(_LOGGER_SCHEMA),
]
"""A logger: `tensorboard`, or `mlflow: {experiment: digits}`."""


def split_entry(entry: str | dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an entry."""
    if isinstance(entry, str):
        return entry, {}
    ((name, options),) = entry.items()
    return name, options
