"""`single`: one process, the reference for all others."""

from __future__ import annotations

from dtrain.train.context import TrainContext
from dtrain.train.strategies.base import Strategy


class SingleStrategy(Strategy):
    """One process, one device.

    Raises:
        UsageError: more than one process was started.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._require_one_process("single")
