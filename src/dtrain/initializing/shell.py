"""Read the commands of a shell script without running it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dtrain.errors import shortened

_REDIRECTION = re.compile(r"(?:^|(?<=\s))[\d&]?>{1,2}(?:&\d|\s*[^\s;&|]+)")
_SUBSTITUTION = re.compile(r"\$\([^()]*\)|`[^`]*`")
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)")
_ARRAY = re.compile(r"^\s*(?:declare -a )?\w+=\((?!.*\))")
_ASSIGNED = re.compile(r"(\w+)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?(?::?-([^}]*))?\}|[@*#?$]|\{…\})")
_OUTPUT = "${…}"
"""Stands for `$(…)`, the output of a command."""
_OPERATORS = set(";|&()")


@dataclass(frozen=True)
class Command:
    """One command of a script."""

    line: int
    """Where it begins."""
    words: list[str]
    raw: str
    """The line as it is written, with continuation lines joined."""

    @property
    def shown(self) -> str:
        return shortened(" ".join(self.words), 60)

    @property
    def redirection(self) -> str:
        """Where the output of the whole line goes, as it is written; empty for the terminal."""
        found = _REDIRECTION.search(self.raw)
        return found[0].strip() if found else ""


def commands(text: str) -> Iterator[Command]:
    """Yield the commands of a script in their order; comments and bodies of `<<` are left out."""
    for number, line in _whole_lines(text):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        plain = _SUBSTITUTION.sub(_OUTPUT, _REDIRECTION.sub(" ", line))
        if array := re.match(r"\s*(?:declare -a )?(\w+)=\((.*)\)\s*$", plain, re.DOTALL):
            yield Command(number, [f"{array[1]}={shlex.join(_split(array[2]))}"], line)
            continue
        words: list[str] = []
        for word in [*_split(plain), ";"]:
            if not set(word) <= _OPERATORS:
                words.append(word)
            elif words:
                yield Command(number, words, line)
                words = []


def _split(text: str) -> list[str]:
    """Return words and operators. A line that is not complete, for example a quote, is one word."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:
        return [text.strip()]


def _whole_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers. A line that continues on the next one is joined with it."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        while line.endswith("\\") or _ARRAY.match(line):
            following = next(lines, None)
            if following is None:
                break
            line = f"{line.removesuffix(chr(92))} {following[1].strip()}"
        yield number, line
        if heredoc := _HEREDOC.search(line):
            for _, body in lines:
                if body.strip() == heredoc[1]:
                    break


def assignment(word: str) -> tuple[str, str] | None:
    """Return the name and the value of `NAME=value`; None for any other word."""
    found = _ASSIGNED.fullmatch(word)
    return None if found is None else (found[1], found[2])


def expanded(command: Command, variables: Mapping[str, str]) -> list[str]:
    """Return the words of a command with the values of variables.

    A variable without a value stays as it is written. A whole array, or a variable without quotes
    around it, becomes as many words as its value has.
    """
    found = []
    for word in command.words:
        value = _VARIABLE.sub(lambda each: _value(each, variables), word)
        is_whole = value != word and _VARIABLE.fullmatch(word)
        if is_whole and "[@]" in word:
            found += _split(value)
        elif is_whole and f'"{word}"' not in command.raw:
            found += value.split()
        else:
            found.append(value)
    return found


def unknown(word: str) -> str:
    """Return a variable that a word has, as text for a person; empty if it has none."""
    found = _VARIABLE.search(word)
    if found is None:
        return ""
    return "the output of a command" if found[0] == _OUTPUT else found[0]


def _value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    value = variables.get(match[1] or match[2] or "")
    if value is None:
        value = match[3]
    return match[0] if value is None else value
