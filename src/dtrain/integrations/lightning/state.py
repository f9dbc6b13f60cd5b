"""The state of Lightning's side of a training, in dtrain's checkpoints."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torchmetrics import Metric

from dtrain.callback import Callback
from dtrain.integrations.lightning.compat import call, pl
from dtrain.integrations.lightning.logging import Logged
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.loop.progress import Progress

logger = logging.getLogger(__name__)


class States(Callback):
    """The states of Lightning's callbacks, in dtrain's checkpoints."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = call._call_callbacks_state_dict(self._trainer)
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        checkpoint = {"callbacks": state, "pytorch-lightning_version": pl.__version__}
        call._call_callbacks_load_state_dict(self._trainer, checkpoint)


class EpochSums(Callback):
    """The sums of the values logged in an unfinished epoch, in dtrain's checkpoints."""

    def __init__(self, logged: Logged, progress: Progress, *, first: bool) -> None:
        self._logged = logged
        self._progress = progress
        self._first = first

    def state_dict(self) -> dict[str, Any]:
        """Return for each name the sum and weight over all ranks. Called by all ranks."""
        sums = self._logged.epoch_so_far()
        return {**sums} if self._progress.position.consumed else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums on rank 0 only, because the ranks' sums are added."""
        if self._first:
            self._logged.continue_from(state)


class Metrics:
    """The torchmetrics objects of a module, with the state that each process has in them."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._metrics = {
            name: each for name, each in module.named_modules() if isinstance(each, Metric)
        }

    def state(self) -> list[dict[str, Any]]:
        """Return the state of every process on rank 0. Called by all ranks."""
        mine = {
            name: {"updates": each._update_count, "states": _copied(each)}
            for name, each in self._metrics.items()
            if each._update_count
        }
        return collectives.gather_to_zero(mine)

    def load(self, states: list[dict[str, Any]], rank: int, world_size: int) -> None:
        """Continue from saved states, one per process.

        Each process takes its own. If their number is not the world size, rank 0 takes them all.
        """
        if len(states) == world_size:
            states = [states[rank]]
        elif rank != 0:
            return
        for each in states:
            for name, saved in each.items():
                if name in self._metrics:
                    self._add(name, saved)

    def _add(self, name: str, saved: dict[str, Any]) -> None:
        metric = self._metrics[name]
        states = {key: _moved(value, metric.device) for key, value in saved["states"].items()}
        first = metric._update_count == 0
        metric._update_count += saved["updates"]
        metric._computed = None
        if first:
            for key, value in states.items():
                setattr(metric, key, value)
            return
        try:
            metric._reduce_states(states)
        except (TypeError, ValueError, RuntimeError):
            metric.reset()
            logger.warning(
                "the states of %s (%s) cannot be combined for another number of processes: it "
                "starts again from zero",
                name,
                type(metric).__name__,
            )


def _copied(metric: Metric) -> dict[str, Any]:
    return {key: _moved(getattr(metric, key), torch.device("cpu")) for key in metric._defaults}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [each.detach().to(device, copy=True) for each in value]
    return value.detach().to(device, copy=True)


class Counts(Callback):
    """The states of torchmetrics objects, in checkpoints of dtrain's step."""

    def __init__(self, module: torch.nn.Module, ranks: RankInfo) -> None:
        self._metrics, self._ranks = Metrics(module), ranks

    def state_dict(self) -> dict[str, Any]:
        states = self._metrics.state()
        return {"ranks": states} if any(states) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._metrics.load(state.get("ranks", []), self._ranks.rank, self._ranks.world_size)
