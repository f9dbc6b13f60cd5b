"""The exceptions that are shown to users, and their exit codes.

::

    DtrainError              exit 1   an error; the message names cause, place and remedy
    ├── UsageError           exit 2   an invalid flag or argument
    ├── JobError             exit 2   job.yaml or a profile is wrong: one or more Problems
    ├── PlanError            exit 2   the job is well formed but cannot be launched like this
    ├── RunNotFound          exit 2   no run, or several, of that name
    ├── LaunchError          exit 1   the launch could not be started
    ├── DamagedError         exit 1   a file of a run does not contain what was written there
    ├── CheckpointError      exit 1   a checkpoint cannot be written or trusted
    └── BlamedError          exit 1   raised on all ranks; some of them are the cause
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_FAILURE = 1
EXIT_USAGE = 2


_MOST_SHOWN = 50
"""The most problems that are shown of one file. The others are shown once these are corrected."""


def quoted(text: str) -> str:
    """Return a user's text for a message, in one printable line of bounded length."""
    return repr(shortened(text, 60))


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters. The excess is cut from its middle."""
    if len(text) <= most:
        return text
    kept = max(0, most - 3)
    return f"{text[: kept - kept // 2]} … {text[len(text) - kept // 2 :]}"


def printable(text: str, most: int = 20_000) -> str:
    """Return a text for a terminal: bounded in length, with control characters escaped.

    Line breaks are kept.
    """
    short = shortened(text, most)
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in short)


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of a library's error, which can have fifty lines or none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0], most) if lines else type(error).__name__


def format_error(error: DtrainError, mark: Callable[[str], str] = str) -> str:
    """Return the lines for the user: `dtrain: MESSAGE  [code]`, for each problem of the error.

    Args:
        error: the error to show.
        mark: a function that formats `[code]`, for example as dim text.
    """
    lines = []
    for message, code in error.parts():
        first, *rest = printable(message).split("\n")
        lines += [f"dtrain: {first}  {mark(f'[{code}]')}" if code else f"dtrain: {first}", *rest]
    return "\n".join(lines)


def without_code(line: str) -> tuple[str, str]:
    """Split a line made by `format_error` into the message and the code at its end, or ""."""
    found = re.search(r"  \[([a-z]+\.[a-z0-9-]+)\]$", line)
    return (line, "") if found is None else (line[: found.start()], found[1])


class DtrainError(Exception):
    """The base of all errors that are shown to users.

    The CLI prints the message and never a traceback.

    Args:
        message: what is wrong, where, and what to do.
        code: stable name of the kind of error, for example `run.not-found`; docs/errors.md lists
            all. A class whose errors are all of one kind sets it itself.
    """

    exit_code = EXIT_FAILURE
    code = ""
    problems: Sequence[Problem] = ()
    """The problems in the user's files; only for a JobError."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code or self.code

    def parts(self) -> list[tuple[str, str]]:
        """Return each problem of the error, with its code."""
        return [(str(self), self.code)]


class UsageError(DtrainError):
    """A flag or an argument is invalid."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class Problem:
    """One problem in a user's file: its location, the field, and what is wrong."""

    file: str
    line: int | None
    """The line, 1-based. None means that the value is not from a file (a flag, a missing file)."""
    column: int | None
    """The column, 1-based."""
    field: str
    """Dotted path of the field, for example `train.global_batch_size`; empty for the whole file."""
    message: str
    code: str = ""
    """Stable name of the kind of problem, for example `job.unknown-field`."""

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f":{self.line}"
            if self.column is not None:
                place += f":{self.column}"
        named = self.line is None and self.file.endswith(f" {self.field}")  # for example `-o mem`
        field = f"{self.field}: " if self.field and not named else ""
        return printable(f"{place}: {field}{self.message}", most=1000).replace("\n", "\\n")


class JobError(DtrainError):
    """job.yaml or a profile is wrong. The error has every problem, not only the first."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        lines = [message for message, _ in self.parts()]
        super().__init__("\n".join(lines), code=self.problems[0].code)

    def parts(self) -> list[tuple[str, str]]:
        shown = [(str(problem), problem.code) for problem in self.problems[:_MOST_SHOWN]]
        further = len(self.problems) - len(shown)
        return [*shown, (f"and {further} more", "")] if further else shown


class PlanError(DtrainError):
    """The job is well formed but cannot be launched with these options.

    Args:
        message: what does not work together, and what would.
        fields: dotted fields of the job that are involved, first the one to change.
        code: as for `DtrainError`.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, fields: Sequence[str] = (), *, code: str = "") -> None:
        super().__init__(message, code=code)
        self.fields = tuple(fields)

    def placed(self, sources: Mapping[str, str]) -> PlanError:
        """Return the error with the location of its first field that has one."""
        places = [sources.get(field, "default") for field in self.fields]
        place = next((place for place in places if place != "default"), None)
        return PlanError(f"{place}: {self}", code=self.code) if place else self


class RunNotFound(DtrainError):
    """No run, or more than one, matches the name."""

    exit_code = EXIT_USAGE


class LaunchError(DtrainError):
    """The launch could not be started."""


class DamagedError(DtrainError):
    """A file of a run's directory, or data from one, does not contain what was written there.

    Args:
        where: the file.
        why: what is wrong with it.
    """

    code = "run.damaged-file"

    def __init__(self, where: str, why: str) -> None:
        self.why = why
        super().__init__(f"{where} is damaged: {why}; restore it from a copy, or remove the run")


class CheckpointError(DtrainError):
    """A checkpoint cannot be written, or no existing one can be trusted."""


class BlamedError(DtrainError):
    """An error that all ranks raise and that some ranks caused.

    Args:
        message: the message, the same on all ranks.
        culprits: the ranks that caused the error; empty if they are unknown.
        rank: the rank of this process.
        code: as for `DtrainError`.
    """

    def __init__(self, message: str, culprits: Sequence[int], rank: int, *, code: str = "") -> None:
        super().__init__(message, code=code)
        self.culprits = list(culprits)
        self.rank = rank
        self.collateral = bool(culprits) and rank not in culprits
        """True if the cause is on another rank."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.culprits, self.rank), self.__dict__
