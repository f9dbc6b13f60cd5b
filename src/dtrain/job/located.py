"""Values together with where they were written, and how layers of them are laid over another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.errors import Problem

Keys = tuple[str | int, ...]
"""The way to a value through sections (names) and lists (positions)."""
FieldProblem = tuple[tuple[str, ...], str, str]
"""A problem without its place: the field, a sentence, and the code of the kind of problem."""


@dataclass(frozen=True)
class SourceLocation:
    """Where a value was written: a spot in a file, or a flag."""

    file: str
    """The file as shown to people, or the flag as it was spelled: `--nodes`."""
    line: int | None = None
    """1-based; None for a flag or a whole file."""
    column: int | None = None
    """1-based."""
    origin: str = ""
    """What the file is, where its name does not say it: `profile slurm`."""

    @property
    def source(self) -> str:
        """One word for the origin of a value: `job.yaml:7`, `--nodes`, `profile slurm (…:4)`."""
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{self.origin} ({where})" if self.origin else where

    def problem(self, field: str, message: str, *, code: str = "") -> Problem:
        return Problem(self.file, self.line, self.column, field, message, code)


@dataclass(frozen=True)
class Located:
    """A value and where it was written; sections and lists hold more of them."""

    value: Any
    """A plain scalar, a `dict[str, Located]` or a `list[Located]`."""
    place: SourceLocation
    key: SourceLocation | None = None
    """Where its key stands, for a value in a section."""
    raw: str | None = None
    """An unquoted scalar, letter by letter: `yes` where the value is True."""

    @classmethod
    def of(cls, value: Any, place: SourceLocation) -> Located:
        """Plain data, all of it written at one place (a flag)."""
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
        """The values met on the way along `keys`, this one first, as far as there are any."""
        met = [self]
        for key in keys:
            inside = met[-1].value
            parts = dict(enumerate(inside)) if isinstance(inside, list) else inside
            if not isinstance(parts, dict) or key not in parts:
                break
            met.append(parts[key])
        return met

    def get(self, keys: Keys) -> Located | None:
        """The value at `keys`; None when nothing is written there."""
        met = self.path(keys)
        return met[-1] if len(met) == len(keys) + 1 else None

    def place_of(self, keys: Keys) -> SourceLocation:
        """Where a value stands; for a section, or a field not written, the section's key."""
        last = self.path(keys)[-1]
        return (isinstance(last.value, dict) and last.key) or last.place

    def nest(self, keys: Keys) -> Located:
        """This value, wrapped in sections so that it stands at `keys`."""
        wrapped = self
        for key in reversed(keys):
            wrapped = Located({key: wrapped}, self.place, key=self.place)
        return wrapped

    def merge_over(self, base: Located) -> Located:
        """Lay this value over another: sections merge key by key, anything else replaces.

        A section written in both keeps the place it has in `base`.
        """
        if not (isinstance(self.value, dict) and isinstance(base.value, dict)):
            return self
        merged = dict(base.value)
        for name, part in self.value.items():
            merged[name] = part.merge_over(merged[name]) if name in merged else part
        return replace(base, value=merged)


def dotted(keys: Keys) -> str:
    """The field's name as people write it: `train.epochs`, `data.paths[1]`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def shown_path(path: Path) -> str:
    """A path in one printable line, relative to the current folder where it lies below it."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def suggest(word: str, known: list[str]) -> str | None:
    """The known word that was probably meant: alike, or of which `word` is a part."""
    import difflib

    folded = {name.lower().replace("-", "_"): name for name in known}
    wanted = word.lower().replace("-", "_")
    close = difflib.get_close_matches(wanted, folded, n=1)
    if close:
        return folded[close[0]]
    holding = [name for name in folded if wanted in name.split("_")]
    return folded[holding[0]] if len(holding) == 1 else None


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known word is near."""
    near = suggest(word, known)
    return f"; did you mean {near!r}?" if near else ""
