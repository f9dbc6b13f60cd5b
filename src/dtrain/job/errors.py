"""Turn pydantic's errors into sentences for users, with the location of each value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dtrain.environ import may_contain_secret
from dtrain.errors import Problem
from dtrain.job.located import Keys, Located, did_you_mean, dotted, suggest
from dtrain.job.model import Model
from dtrain.job.units import WrongTypeError, found

Area = Literal["job", "profile", "option"]
"""The kind of file or section that the fields belong to. It is the first part of problem codes."""

_EXPECTED = {
    "string_too_short": "some text",
    "string_type": "text",
    "dict_type": "a section of `name: value` lines",
    "model_type": "a section of `name: value` lines",
    "list_type": "a list",
}
_BATCH = "train.global_batch_size (samples per step, over all processes)"
_COMMON_NAMES = {
    "batch_size": _BATCH,
    "train.batch_size": _BATCH,
    "data.batch_size": _BATCH,
}
"""Names that other tools use for fields of dtrain."""
_UNKNOWN = "extra_forbidden"
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def explain(
    error: ValidationError,
    root: Located,
    model: type[Model],
    listed: str = "",
    area: Area = "job",
) -> list[Problem]:
    """Return one problem for each field that pydantic refused.

    Args:
        error: raised when `root.plain()` was validated as `model`.
        root: the values as written, with their locations.
        model: the model of the whole file, for hints about where a key belongs.
        listed: a sentence with the keys of the top section; empty means the keys of `model`.
        area: the kind of file or section that the fields belong to.
    """
    listed = listed or f"this file can have: {', '.join(model.model_fields)}"
    by_field: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(_keys(detail, root), []).append(detail)
    by_field.pop((), None)  # between fields: cross_problems reports these, with locations
    misspelt = {_meant(keys, model) for keys, d in by_field.items() if _kind(d) == _UNKNOWN}
    return [
        _problem(keys, details, root, model, listed, area)
        for keys, details in by_field.items()
        if not (_kind(details) == "missing" and keys in misspelt)
    ]


def model_at(model: type[Model], keys: Keys) -> type[Model] | None:
    """Return the model of the section at `keys`. Return None where the keys are free (for example
    `args`)."""
    at: type[Model] | None = model
    for key in keys:
        field = at.model_fields.get(str(key)) if at else None
        at = submodel(field) if field else None
    return at


def submodel(field: FieldInfo) -> type[Model] | None:
    """Return the model of a field that is a section, optional or not, or None."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Model):
            return kind
    return None


def fields_of(model: type[Model], above: Keys = ()) -> Iterator[Keys]:
    """Yield the keys of every field of a model, including the fields of its sections."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        inside = submodel(field)
        if inside:
            yield from fields_of(inside, (*above, name))


def _keys(detail: ErrorDetails, root: Located) -> Keys:
    """Return the field behind pydantic's `loc`, which also names members of unions and tuples."""
    loc = tuple(detail["loc"])
    written = len(root.path(loc)) - 1
    return loc if detail["type"] == "missing" else loc[:written]


def _kind(details: list[ErrorDetails]) -> str:
    return details[0]["type"]


def _meant(keys: Keys, model: type[Model]) -> Keys:
    """Return the field of the same section that a misspelt key is closest to."""
    here = list((model_at(model, keys[:-1]) or model).model_fields)
    if meant := _COMMON_NAMES.get(dotted(keys)):
        return tuple(meant.partition(" ")[0].split("."))
    return (*keys[:-1], suggest(str(keys[-1]), here) or "")


def _problem(
    keys: Keys,
    details: list[ErrorDetails],
    root: Located,
    model: type[Model],
    listed: str,
    area: Area,
) -> Problem:
    if _kind(details) == "missing":
        field = (model_at(model, keys[:-1]) or model).model_fields[str(keys[-1])]
        about = (field.description or "").replace("\n", " ").partition(". ")[0].rstrip(".")
        return root.place_of(keys).problem(
            dotted(keys), f"missing: {about}", code=f"{area}.missing-field"
        )
    written = root.path(keys)[-1]
    if _kind(details) == _UNKNOWN:
        place = written.key or written.place
        return place.problem(
            dotted(keys), _unknown_key(keys, root, model, listed), code=f"{area}.unknown-field"
        )
    code = code_of(details[0], area)
    return written.place.problem(dotted(keys), _wrong_value(details, written), code=code)


def code_of(detail: ErrorDetails, area: Area) -> str:
    """Return the code for a value that pydantic refused. `area` is the same as in `explain`."""
    kind = detail["type"]
    if kind in _BOUNDS:
        return f"{area}.out-of-range"
    is_type = kind.endswith(("_type", "_parsing", "_from_float")) or isinstance(
        detail.get("ctx", {}).get("error"), WrongTypeError
    )
    return f"{area}.wrong-type" if is_type else f"{area}.invalid-value"


def _unknown_key(keys: Keys, root: Located, model: type[Model], listed: str) -> str:
    word, section = str(keys[-1]), keys[:-1]
    here = list((model_at(model, section) or model).model_fields)
    others = [other for other in fields_of(model) if other[:-1] != section]
    if meant := _COMMON_NAMES.get(dotted(keys)):
        return f"unknown; did you mean {meant}?"
    if homes := [other for other in others if other[-1] == word]:
        return f"unknown here; it belongs {_belongs(homes)}"
    if near := suggest(word, here):
        return f"unknown; did you mean {near!r}?"
    if root.get(("args", word)) is not None:
        return f"unknown here; as an argument of the task it is args.{word}"
    if near := suggest(word, [str(other[-1]) for other in others]):
        homes = [other for other in others if other[-1] == near]
        return f"unknown; did you mean {near!r}? It belongs {_belongs(homes)}"
    if section:
        listed = f"{dotted(section)} has: {', '.join(here)}"
    return f"unknown; {listed}"


def _belongs(homes: list[Keys]) -> str:
    return " or ".join(f"under {dotted(home[:-1])}" if home[1:] else "at the top" for home in homes)


def _wrong_value(details: list[ErrorDetails], written: Located) -> str:
    """Return `expected …; found …`, with a fix where the fix is obvious."""
    kind, context = _kind(details), details[0].get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}; found {_found(written)}"
    if kind == "value_error":
        return str(context["error"]).replace(found(written.value), _found(written))
    allowed = [word for detail in details for word in _words(detail)]
    expected = [_EXPECTED.get(d["type"], d["msg"]) for d in details if not _words(d)]
    if allowed:
        one_of = " or ".join(allowed) if len(allowed) < 3 else f"one of {', '.join(allowed)}"
        expected.append(one_of)
    hint = ""
    if len(details) == 1 and kind == "string_type" and written.raw:
        hint = f'; put it in quotes: "{written.raw}"'
    elif isinstance(written.value, str):
        hint = did_you_mean(written.value, allowed)
    return f"expected {' or '.join(expected)}; found {_found(written)}{hint}"


def _words(detail: ErrorDetails) -> list[str]:
    """Return the allowed words, where only some words are allowed."""
    if detail["type"] == "literal_error":
        return re.findall(r"'([^']*)'", detail["ctx"]["expected"])
    return ["true", "false"] if detail["type"] == "bool_type" else []


def _found(written: Located) -> str:
    if isinstance(written.value, str) and may_contain_secret(written.value):
        return "a text that may be a secret"
    words = found(written.plain())
    if isinstance(written.value, bool) and written.raw and written.raw.lower() != words:
        return f"{written.raw}, which YAML reads as {words}"
    return words
