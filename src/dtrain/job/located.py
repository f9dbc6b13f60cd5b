"""Values with the locations where they were written, and the merging of layers of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.errors import Problem

Keys = tuple[str | int, ...]
"""The path to a value through sections (names) and lists (positions)."""
FieldProblem = tuple[tuple[str, ...], str, str]
"""A problem without its location: the field, a sentence, and the code of the kind of problem."""


@dataclass(frozen=True)
class SourceLocation:
    """The location of a value: a position in a file, or a flag."""

    file: str
    """The file as shown to users, or the flag as it was spelled: `--nodes`."""
    line: int | None = None
    """The line, counted from 1. None means a flag or a whole file."""
    column: int | None = None
    """The column, counted from 1."""
    origin: str = ""
    """A description of the file, where its name is not enough: `profile slurm`."""

    @property
    def source(self) -> str:
        """A short text for the origin of a value: `job.yaml:7`, `--nodes`,
        `profile slurm (…:4)`."""
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{self.origin} ({where})" if self.origin else where

    def problem(self, field: str, message: str, *, code: str = "") -> Problem:
        return Problem(self.file, self.line, self.column, field, message, code)


@dataclass(frozen=True)
class Located:
    """A value and the location where it was written. Sections and lists contain further ones."""

    value: Any
    """A plain scalar, a `dict[str, Located]` or a `list[Located]`."""
    place: SourceLocation
    key: SourceLocation | None = None
    """The location of its key, for a value in a section."""
    raw: str | None = None
    """The letters of an unquoted scalar: `yes` where the value is True."""

    @classmethod
    def of(cls, value: Any, place: SourceLocation) -> Located:
        """Return plain data with one location for all of it (a flag)."""
        if isinstance(value, Mapping):
            value = {name: cls.of(part, place) for name, part in value.items()}
        elif isinstance(value, list | tuple):
            value = [cls.of(part, place) for part in value]
        return cls(value, place, key=place)

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {name: part.plain() for name, part in self.value.items()}
        if isinstance(self.value, list):
            return [part.plain() for part in self.value]
        return self.value

    def path(self, keys: Keys) -> list[Located]:
        """Return the values along `keys`, starting with this one, as far as they exist."""
        met = [self]
        for key in keys:
            inside = met[-1].value
            parts = dict(enumerate(inside)) if isinstance(inside, list) else inside
            if not isinstance(parts, dict) or key not in parts:
                break
            met.append(parts[key])
        return met

    def get(self, keys: Keys) -> Located | None:
        """Return the value at `keys`, or None when nothing is written there."""
        met = self.path(keys)
        return met[-1] if len(met) == len(keys) + 1 else None

    def place_of(self, keys: Keys) -> SourceLocation:
        """Return the location of a value. For a section, or a field not written, return the
        section's key."""
        last = self.path(keys)[-1]
        return (isinstance(last.value, dict) and last.key) or last.place

    def nest(self, keys: Keys) -> Located:
        """Return this value, wrapped in sections so that it is at `keys`."""
        wrapped = self
        for key in reversed(keys):
            wrapped = Located({key: wrapped}, self.place, key=self.place)
        return wrapped

    def merge_over(self, base: Located) -> Located:
        """Lay this value over another: sections merge key by key, anything else replaces.

        A section written in both keeps its location in `base`.
        """
        if not (isinstance(self.value, dict) and isinstance(base.value, dict)):
            return self
        merged = dict(base.value)
        for name, part in self.value.items():
            merged[name] = part.merge_over(merged[name]) if name in merged else part
        return replace(base, value=merged)


def dotted(keys: Keys) -> str:
    """Return the field's name in the form that users write: `train.epochs`, `data.paths[1]`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def shown_path(path: Path) -> str:
    """Return a path as one printable line. It is relative if it is in the current directory."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def suggest(word: str, known: list[str]) -> str | None:
    """Return the known word that was probably meant: one that is similar or contains `word`."""
    import difflib

    folded = {name.lower().replace("-", "_"): name for name in known}
    wanted = word.lower().replace("-", "_")
    close = difflib.get_close_matches(wanted, folded, n=1)
    if close:
        return folded[close[0]]
    holding = [name for name in folded if wanted in name.split("_")]
    return folded[holding[0]] if len(holding) == 1 else None


def did_you_mean(word: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?`, or an empty text when no known word is similar."""
    near = suggest(word, known)
    return f"; did you mean {near!r}?" if near else ""
