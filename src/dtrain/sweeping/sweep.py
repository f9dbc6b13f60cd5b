"""Find a sweep by the name that a user gives, and list its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.errors import DtrainError
from dtrain.launch_plan import Element, LaunchPlan
from dtrain.run.lookup import find, local_directory
from dtrain.run.rundir import RunDir, list_runs

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Sweep:
    """The runs that one `dtrain launch --sweep` has made. All that is known is in their plans."""

    id: str
    runs: Sequence[RunDir]
    """Its runs that exist, in their order."""
    elements: Sequence[Element]
    """The place of each of these runs."""

    @property
    def missing(self) -> list[int]:
        """The numbers of runs that were removed, or never written."""
        there = {element.index for element in self.elements}
        return [index for index in range(self.elements[0].count) if index not in there]

    @property
    def fields(self) -> list[str]:
        """The fields that differ between the runs."""
        return list(self.elements[0].values)


def find_sweep(name: str, runs: str) -> Sweep | None:
    """Return the sweep that a user named by its id or by the beginning of it.

    Return None if the name is that of a run, or belongs to no sweep. Only the plans of runs whose
    id begins with the name are read.

    Args:
        name: the name that the user wrote.
        runs: the directory or URL of all runs.
    """
    if name == "last":
        return None
    found = [run for run in list_runs(local_directory(runs)) if run.id.startswith(name)]
    if not name or any(run.id == name for run in found):
        return None
    elements = [(element, run) for run in found if (element := element_of(run)) is not None]
    ids = {element.sweep for element, _ in elements if element.sweep.startswith(name)}
    chosen = name if name in ids else next(iter(ids), None)
    if chosen is None or (chosen != name and (len(ids) > 1 or len(elements) < len(found))):
        return None
    elements = [each for each in elements if each[0].sweep == chosen]
    if chosen != name and len(elements) == 1:  # the beginning of a run's id
        return None
    elements.sort(key=lambda each: each[0].index)
    return Sweep(chosen, [run for _, run in elements], [element for element, _ in elements])


def find_runs(names: Iterable[str], runs: str) -> list[RunDir]:
    """Return the runs that a user named. The name of a sweep stands for all of its runs.

    Raises:
        RunNotFound: there is no such run.
    """
    found: dict[str, RunDir] = {}
    for name in names:
        sweep = find_sweep(name, runs)
        for run in [find(name, runs)] if sweep is None else sweep.runs:
            found.setdefault(str(run.path), run)
    return list(found.values())


def element_of(run: RunDir) -> Element | None:
    """Return the place of a run in its sweep. None if it has none, or its plan is damaged."""
    try:
        return LaunchPlan.read(run).sweep
    except DtrainError:
        return None
