"""The exceptions that reach a person, and the exit codes that go with them.

::

    DtrainError              exit 1   something went wrong; the message says what, where, what to do
    ├── UsageError           exit 2   a flag or an argument that cannot be meant
    ├── JobError             exit 2   job.yaml or a profile is wrong: one or more Problems
    ├── PlanError            exit 2   the job is well formed but cannot be launched like this
    ├── RunNotFound          exit 2   no run, or several, of that name
    ├── LaunchError          exit 1   the launch could not be started
    ├── DamagedError         exit 1   a file of a run does not hold what was written there
    ├── CheckpointError      exit 1   a checkpoint cannot be written or trusted
    └── BlamedError          exit 1   raised on all ranks, some of which are to blame
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_FAILURE = 1
EXIT_USAGE = 2


_MOST_SHOWN = 50
"""Problems of one file; who wrote more sees the same ones again after mending these."""


def quoted(text: str) -> str:
    """What a person wrote, in one printable line of bounded length, for a message."""
    return repr(shortened(text, 60))


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters: what is too much is left out in the middle."""
    if len(text) <= most:
        return text
    kept = max(0, most - 3)
    return f"{text[: kept - kept // 2]} … {text[len(text) - kept // 2 :]}"


def printable(text: str, most: int = 20_000) -> str:
    """A text for a terminal: of bounded length, control characters but line breaks escaped."""
    short = shortened(text, most)
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in short)


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says first; some say fifty lines, and some nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0], most) if lines else type(error).__name__


def told(error: DtrainError, mark: Callable[[str], str] = str) -> str:
    """The lines that a person reads: `dtrain: MESSAGE  [code]`, for each of several problems.

    Args:
        error: what to tell.
        mark: how `[code]` is written, for example dim.
    """
    lines = []
    for message, code in error.parts():
        first, *rest = printable(message).split("\n")
        lines += [f"dtrain: {first}  {mark(f'[{code}]')}" if code else f"dtrain: {first}", *rest]
    return "\n".join(lines)


def without_code(line: str) -> tuple[str, str]:
    """A line that `told` has made for another process, and the code at its end; empty: none."""
    found = re.search(r"  \[([a-z]+\.[a-z0-9-]+)\]$", line)
    return (line, "") if found is None else (line[: found.start()], found[1])


class DtrainError(Exception):
    """Base of all errors meant for people: the CLI prints the message and never a traceback.

    Args:
        message: what is wrong, where, and what to do.
        code: stable name of the kind of error, for example `run.not-found`; docs/errors.md lists
            all. A class whose errors are all of one kind sets it itself.
    """

    exit_code = EXIT_FAILURE
    code = ""
    problems: Sequence[Problem] = ()
    """What is wrong in files of the user's; only of a JobError."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code or self.code

    def parts(self) -> list[tuple[str, str]]:
        """Each problem that the error tells of, with its code."""
        return [(str(self), self.code)]


class UsageError(DtrainError):
    """A flag or an argument that cannot be meant."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file of the user's: where it is, which field, what is wrong."""

    file: str
    line: int | None
    """1-based; None when the value did not come from a file (a flag, a missing file)."""
    column: int | None
    """1-based."""
    field: str
    """Dotted path of the field, as `train.global_batch_size`; empty for the whole file."""
    message: str
    code: str = ""
    """Stable name of the kind of problem, for example `job.unknown-field`."""

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place += f":{self.line}"
            if self.column is not None:
                place += f":{self.column}"
        named = self.line is None and self.file.endswith(f" {self.field}")  # `-o mem`
        field = f"{self.field}: " if self.field and not named else ""
        return printable(f"{place}: {field}{self.message}", most=1000).replace("\n", "\\n")


class JobError(DtrainError):
    """job.yaml or a profile is wrong; carries every problem found, not just the first."""

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
    """The job is well formed but cannot be launched as asked.

    Args:
        message: what does not go together, and what would.
        fields: dotted fields of the job that it is about, first the one to change.
        code: as for `DtrainError`.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, fields: Sequence[str] = (), *, code: str = "") -> None:
        super().__init__(message, code=code)
        self.fields = tuple(fields)

    def placed(self, sources: Mapping[str, str]) -> PlanError:
        """The error with the place where the first of its fields that is written stands."""
        places = [sources.get(field, "default") for field in self.fields]
        place = next((place for place in places if place != "default"), None)
        return PlanError(f"{place}: {self}", code=self.code) if place else self


class RunNotFound(DtrainError):
    """No run, or more than one, answers to the name given."""

    exit_code = EXIT_USAGE


class LaunchError(DtrainError):
    """The launch could not be started."""


class DamagedError(DtrainError):
    """A file of a run's directory, or what came from one, does not hold what was written there.

    Args:
        where: the file.
        why: what is wrong with it.
    """

    code = "run.damaged-file"

    def __init__(self, where: str, why: str) -> None:
        self.why = why
        super().__init__(f"{where} is damaged: {why}; bring it back from a copy, or remove the run")


class CheckpointError(DtrainError):
    """A checkpoint cannot be written, or none of those present can be trusted."""


class BlamedError(DtrainError):
    """Something that all ranks raise and some are to blame for.

    Args:
        message: the same on all ranks.
        culprits: ranks that are to blame; empty when nobody can tell.
        rank: this process's.
        code: as for `DtrainError`.
    """

    def __init__(self, message: str, culprits: Sequence[int], rank: int, *, code: str = "") -> None:
        super().__init__(message, code=code)
        self.culprits = list(culprits)
        self.rank = rank
        self.collateral = bool(culprits) and rank not in culprits
        """Whether the cause is on another rank."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.culprits, self.rank), self.__dict__
