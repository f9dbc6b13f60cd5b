"""Lines of events.jsonl, written by rank 0."""

from __future__ import annotations

import time
from typing import Any

from dtrain.ranks import RankInfo
from dtrain.run.files import append_line
from dtrain.run.rundir import RunDir


class Events:
    """What happened to the training, one JSON object a line; silent except on rank 0."""

    def __init__(self, run: RunDir, ranks: RankInfo, attempt: int) -> None:
        self._run = run
        self._ranks = ranks
        self._attempt = attempt

    def write(self, event: str, **details: Any) -> None:
        """Append one event with the time (seconds since the epoch), attempt and restart."""
        if self._ranks.is_rank_zero:
            place = {"attempt": self._attempt, "restart": self._ranks.restart}
            append_line(self._run.events, {"time": time.time(), "event": event, **place, **details})
