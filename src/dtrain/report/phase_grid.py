"""The time of each rank in each phase, over the time of the run."""

from __future__ import annotations

from typing import Any

from dtrain.run.phases import OWN, PHASES, straggler

NUM_COLUMNS = 120


class PhaseGrid:
    """Adds up records of phases: for each rank, and for each of `NUM_COLUMNS` parts of the time.

    Args:
        start: the start of the time, in seconds since the epoch.
        end: its end.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, max(end, start + 1e-3)
        self._cells: dict[int, list[dict[str, float]]] = {}
        """rank → column → phase → seconds. `steps` is the number of steps."""

    def add(self, rank: int, line: dict[str, Any]) -> None:
        """Add a record of a rank, see `dtrain.run.phases.read_phases`."""
        cells = self._cells.get(rank)
        if cells is None:
            cells = self._cells[rank] = [{} for _ in range(NUM_COLUMNS)]
        phases = line["phases"]
        last = self._column(line["time"])
        first = self._column(line["time"] - sum(phases.values()))
        for column in range(int(first), int(last) + 1):
            share = 1.0
            if int(first) < int(last):
                share = (min(last, column + 1) - max(first, column)) / (last - first)
            cell = cells[column]
            cell["steps"] = cell.get("steps", 0.0) + share * line["steps"]
            for phase, seconds in phases.items():
                cell[phase] = cell.get(phase, 0.0) + share * seconds

    def _column(self, when: float) -> float:
        place = NUM_COLUMNS * (when - self.start) / (self.end - self.start)
        return min(NUM_COLUMNS - 1e-6, max(0.0, place))

    @property
    def ranks(self) -> list[int]:
        return sorted(self._cells)

    def rank_seconds(self, rank: int) -> dict[str, float]:
        """Return the seconds of a rank in each phase over the whole run, and `steps`."""
        cells = self._cells.get(rank, [])
        names = ("steps", *PHASES)
        found = {name: sum(cell.get(name, 0.0) for cell in cells) for name in names}
        return {name: value for name, value in found.items() if value}

    def own_seconds(self) -> list[list[float | None]]:
        """Return for each rank and column how long a step took without waiting for other ranks.

        None means that the rank did no step then. The ranks are in the order of `ranks`.
        """
        return [
            [sum(c.get(phase, 0.0) for phase in OWN) / c["steps"] if c.get("steps") else None
             for c in self._cells[rank]]
            for rank in self.ranks
        ]  # fmt: skip

    def shares(self, phase: str) -> list[list[float | None]]:
        """Return for each rank and column which share of the time it was in a phase."""

        def share(cell: dict[str, float]) -> float | None:
            total = sum(value for name, value in cell.items() if name != "steps")
            return cell.get(phase, 0.0) / total if total else None

        return [[share(cell) for cell in self._cells[rank]] for rank in self.ranks]

    def straggler(self) -> tuple[int, float] | None:
        """Return the slowest rank, and how many times the median it takes for its own part.

        None means that no rank is much slower than the others.
        """
        own = {}
        for rank in self.ranks:
            spent = self.rank_seconds(rank)
            if spent.get("steps"):
                own[rank] = sum(spent.get(phase, 0.0) for phase in OWN) / spent["steps"]
        return straggler(own)

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return rank → phase → seconds over the whole run, and `steps`."""
        return {
            str(rank): {name: round(value, 6) for name, value in self.rank_seconds(rank).items()}
            for rank in self.ranks
        }
