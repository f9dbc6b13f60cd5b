"""What a framework's integration checks of a job before a launch, found through the catalog."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.errors import Problem
from dtrain.job.located import Keys, Located, SourceLocation, dotted
from dtrain.job.static_source import Source


@dataclass(frozen=True)
class NamedClass:
    """A field of the job that names a class, and the one with its constructor's arguments."""

    root: Located
    """The job as written."""
    field: Keys
    args: Keys
    trainer: str | None
    """Of the job; None when that is no text."""

    @property
    def place(self) -> SourceLocation:
        return self.root.place_of(self.field)

    def problem(self, message: str, *, code: str = "") -> Problem:
        return self.place.problem(dotted(self.field), message, code=code)


class JobCheck:
    """Base of the checks; they read files, and import neither the framework nor torch."""

    def between_fields(self, job: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
        """Pairs of a field and a sentence, as `dtrain.job.spec.cross_problems` returns them."""
        return []

    def references(self, root: Located) -> Iterator[Problem]:
        """What is named outside of the job's own file and is not there."""
        return iter(())

    def of_class(
        self, named: NamedClass, name: str, file: Path, source: Source
    ) -> Iterator[Problem]:
        """What of a class cannot be trained as asked.

        Args:
            named: the field that names it.
            name: its own name.
            file: where it is.
            source: what is in that file.
        """
        return iter(())


def job_checks() -> list[JobCheck]:
    return [catalog.imported(fact.job_check)() for fact in catalog.FRAMEWORKS.values()]
