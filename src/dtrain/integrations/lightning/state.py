"""What Lightning's side of a training remembers, in dtrain's checkpoints."""

from __future__ import annotations

from typing import Any

from dtrain.callback import Callback
from dtrain.integrations.lightning.compat import call, pl
from dtrain.integrations.lightning.logging import Logged
from dtrain.train.loop.progress import Progress


class States(Callback):
    """What Lightning's callbacks remember, in dtrain's checkpoints."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = call._call_callbacks_state_dict(self._trainer)
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        checkpoint = {"callbacks": state, "pytorch-lightning_version": pl.__version__}
        call._call_callbacks_load_state_dict(self._trainer, checkpoint)


class EpochSums(Callback):
    """What was logged in an epoch that is not over, in dtrain's checkpoints."""

    def __init__(self, logged: Logged, progress: Progress, *, first: bool) -> None:
        self._logged = logged
        self._progress = progress
        self._first = first

    def state_dict(self) -> dict[str, Any]:
        """By name, sum and weight over all ranks. Called by all ranks."""
        sums = self._logged.epoch_so_far()
        return {**sums} if self._progress.position.consumed else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Only rank 0 goes on with them, as the ranks' sums are added up."""
        if self._first:
            self._logged.go_on(state)
