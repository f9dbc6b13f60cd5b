"""The events of a training, which rank 0 writes to events.jsonl."""

from __future__ import annotations

import time
from typing import Any

from dtrain.ranks import RankInfo
from dtrain.run.files import append_line
from dtrain.run.rundir import RunDir


class Events:
    """Appends events of the training, one JSON object per line; rank 0 alone writes."""

    def __init__(self, run: RunDir, ranks: RankInfo, attempt: int) -> None:
        self._run = run
        self._ranks = ranks
        self._attempt = attempt

    def write(self, event: str, **details: Any) -> None:
        """Append one event with the time (seconds since the epoch), attempt and restart."""
        if self._ranks.is_rank_zero:
            start = {"attempt": self._attempt, "restart": self._ranks.restart}
            append_line(self._run.events, {"time": time.time(), "event": event, **start, **details})
