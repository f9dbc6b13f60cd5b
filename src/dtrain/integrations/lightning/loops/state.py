"""What Lightning's loops remember, in dtrain's checkpoints, and how they go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dtrain.errors import CheckpointError
from dtrain.integrations.lightning.compat import pl
from dtrain.integrations.lightning.loops.strategy import named_state
from dtrain.integrations.lightning.reductions import Part, QuietResults, kind_of, together
from dtrain.train import collectives
from dtrain.train.checkpoint.leaves import refuse_unreadable

_OF_RUN = ("hyper_parameters", "hparams_name", "hparams_type", "datamodule_hyper_parameters")
"""What Lightning's checkpoints hold of constructors' arguments: here the job has them."""


def dumped(trainer: pl.Trainer, *, mid_epoch: bool) -> dict[str, Any]:
    """What Lightning would save now, at a step boundary. Called by all ranks.

    Args:
        trainer: in a fit.
        mid_epoch: whether the epoch goes on after this step.

    Returns:
        By file stem. Optimizers' states are by parameter name.

    Raises:
        DtrainError: it holds what a checkpoint cannot; says whose, and where.
    """
    module = trainer.lightning_module
    state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for name in list(state):
        if any(name.startswith(prefix) for prefix in _OF_RUN):
            del state[name]
    model = state.pop("state_dict")
    optimizers = [
        named_state(module, *each)
        for each in zip(trainer.strategy.optimizers, state.pop("optimizer_states"), strict=True)
    ]
    state["callback_metrics"] = dict(trainer._logger_connector._callback_metrics)
    _place(state["loops"]["fit_loop"], mid_epoch=mid_epoch)
    for name, value in state.items():
        refuse_unreadable(value, f"what a hook of Lightning's puts into a checkpoint, {name}")
    for name, value in model.items():
        if not isinstance(value, torch.Tensor):
            refuse_unreadable(value, f"get_extra_state() of the model, {name}")
    return {"model": model, "optimizer": {"optimizers": optimizers}, "lightning": state}


def restored(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `dumped`: what Lightning takes for a loaded file.

    Raises:
        CheckpointError: the checkpoint is of dtrain's step.
    """
    if "lightning" not in tensors:
        raise CheckpointError(
            "it was made with dtrain's step, and these are Lightning's loops: launch it with "
            "--set lightning.step=dtrain",
            code="lightning.checkpoint-of-other-step",
        )
    return {
        **tensors["lightning"],
        "state_dict": tensors["model"],
        "optimizer_states": tensors["optimizer"]["optimizers"],
    }


def _place(loop: dict[str, Any], *, mid_epoch: bool) -> None:
    """Say clearly whether the epoch is over, wherever among its hooks Lightning is.

    With `max_steps`, its own restart would take the batches of an epoch that is over for those of
    the next, and leave that at once; and where `max_steps` cuts an epoch, it counts as complete.
    """
    for count in loop["epoch_progress"].values():
        done = count["started"] - mid_epoch
        count["processed"] = count["completed"] = done
    if not mid_epoch:
        progress = loop["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False


class ExactResults(QuietResults):
    """What a module logs, put together over all ranks where a loader has been read to its end.

    Lightning takes each rank's own mean unless a module asks for `sync_dist`. Here the mean over
    the samples of all ranks is known on all of them before any hook can ask for it; a rank that
    has not logged something takes no part in it, and does not make the others wait.
    """

    def __init__(self, training: bool, trainer: pl.Trainer) -> None:
        super().__init__(training, trainer)
        self._before: dict[str, tuple[float, float]] = {}
        """Of an interrupted epoch: by key, what was counted, until it is logged again."""

    def __setitem__(self, key: str, metric: Any) -> None:
        super().__setitem__(key, metric)
        if key in self._before:
            value, weight = self._before.pop(key)
            metric.value = torch.tensor(value, dtype=metric.value.dtype)
            if metric.meta.is_mean_reduction:
                metric.cumulated_batch_size = torch.tensor(round(weight))
            metric._update_count = 1

    def meet(self) -> None:
        """Put together what was logged by value for the epoch. Called by all ranks."""
        sums = self._sums()
        for key, metric in self._of_epoch().items():
            value, weight = sums[key]
            if metric.meta.is_mean_reduction:
                value = value / weight if weight else float("nan")
            metric._computed = torch.tensor(
                value, dtype=metric.value.dtype, device=metric.value.device
            )

    def state(self) -> dict[str, list[float]]:
        """By key the value and its weight so far, over all ranks. Called by all ranks."""
        return {key: [value, weight] for key, (value, weight) in self._sums().items()}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Only rank 0 goes on with them, as they are those of all."""
        if rank == 0:
            self._before = {key: (value, weight) for key, (value, weight) in state.items()}

    def _of_epoch(self) -> dict[str, Any]:
        return {
            key: each
            for key, each in self.items()
            if each.is_tensor and each.meta.on_epoch and each._update_count
        }

    def _sums(self) -> dict[str, tuple[float, float]]:
        mine: dict[str, Part] = {}
        for key, metric in self._of_epoch().items():
            mean = metric.meta.is_mean_reduction
            weight = float(metric.cumulated_batch_size) if mean else 1.0
            mine[key] = (kind_of(metric), float(metric.value), weight)
        return together(collectives.gather_to_all(mine))
