"""Checks of a job by the integration of a framework, before a launch; the catalog lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.errors import Problem
from dtrain.job.located import FieldProblem, Keys, Located, SourceLocation, dotted
from dtrain.job.static_source import Source


@dataclass(frozen=True)
class NamedClass:
    """A field of the job that names a class, with the field that holds its constructor's
    arguments."""

    root: Located
    """The job as written."""
    field: Keys
    args: Keys
    trainer: str | None
    """The trainer of the job. None means that it is not text."""

    @property
    def place(self) -> SourceLocation:
        return self.root.place_of(self.field)

    def problem(self, message: str, *, code: str = "") -> Problem:
        return self.place.problem(dotted(self.field), message, code=code)


class JobCheck:
    """The base class of the checks. They read files, and import neither the framework nor torch."""

    def between_fields(self, job: Mapping[str, Any]) -> list[FieldProblem]:
        """Return problems between fields, in the form that `dtrain.job.spec.cross_problems`
        returns."""
        return []

    def references(self, root: Located) -> Iterator[Problem]:
        """Yield a problem for each thing that the job names outside its own file and that does not
        exist."""
        return iter(())

    def of_class(
        self, named: NamedClass, name: str, file: Path, source: Source
    ) -> Iterator[Problem]:
        """Yield a problem for each property of a class that prevents the requested training.

        Args:
            named: the field that names the class.
            name: the name of the class.
            file: the file that defines it.
            source: the parsed contents of that file.
        """
        return iter(())


def job_checks() -> list[JobCheck]:
    return [catalog.imported(fact.job_check)() for fact in catalog.FRAMEWORKS.values()]
