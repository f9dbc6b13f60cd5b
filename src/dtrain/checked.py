"""Validation of data from other processes: the type, the range and the size of each value."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")
_adapters: dict[Any, TypeAdapter[Any]] = {}
CONFIG = ConfigDict(strict=True, extra="forbid")
"""A `__pydantic_config__` for dataclasses: no value is accepted in place of another type."""


def _cut(most: int) -> Callable[[str], str]:
    return lambda text: text[:most]


MOST = 1 << 16
"""The largest number of characters of a text."""
Text = Annotated[str, AfterValidator(_cut(MOST))]
"""A text. The rest of a longer one is dropped."""
Name = Annotated[str, AfterValidator(_cut(255))]
Whole = Annotated[int, Field(ge=0, lt=1 << 53)]
Rank = Annotated[int, Field(ge=0, lt=1 << 24)]
Port = Annotated[int, Field(gt=0, lt=1 << 16)]
Signal = Annotated[int, Field(gt=0, lt=65)]
ExitCode = Annotated[int, Field(gt=-(1 << 31), lt=1 << 32)]
Time = Annotated[float, Field(allow_inf_nan=False)]


def read(kind: type[T], text: str | bytes) -> T:
    """Parse and validate a JSON text.

    Raises:
        ValueError: the text is not valid for `kind`; the message names the first bad field.
    """
    adapter = _adapters.get(kind) or _adapters.setdefault(kind, TypeAdapter(kind))
    try:
        try:
            found: T = adapter.validate_json(text)
        except ValidationError:
            found = adapter.validate_json(_without_surrogates(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    return found


def _without_surrogates(text: str | bytes) -> bytes:
    """Replace surrogates, which Python uses for example in a file name that is not UTF-8."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace")
    except RecursionError:
        raise ValueError("nested too deeply") from None
