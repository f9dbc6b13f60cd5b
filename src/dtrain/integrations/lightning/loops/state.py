"""The state of Lightning's loops, in dtrain's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dtrain.errors import CheckpointError
from dtrain.integrations.lightning.compat import pl
from dtrain.integrations.lightning.loops.strategy import named_state
from dtrain.integrations.lightning.reductions import Part, QuietResults, combined, kind_of
from dtrain.train import collectives
from dtrain.train.checkpoint.leaves import refuse_unreadable
from dtrain.train.checkpoint.parts import whole

_OF_RUN = ("hyper_parameters", "hparams_name", "hparams_type", "datamodule_hyper_parameters")
"""The prefixes of constructors' arguments in Lightning's checkpoints; here the job has them."""


def dumped(trainer: pl.Trainer, *, mid_epoch: bool) -> dict[str, Any]:
    """Return the state that Lightning would save now, at a step boundary. Called by all ranks.

    Args:
        trainer: a trainer in a fit.
        mid_epoch: whether the epoch continues after this step.

    Returns:
        Trees of state by name. Optimizers' states are by parameter name.

    Raises:
        DtrainError: a value cannot be in a checkpoint; the message names its owner and its key.
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
    _set_position(state["loops"]["fit_loop"], mid_epoch=mid_epoch)
    for name, value in state.items():
        refuse_unreadable(value, f"the value that a Lightning hook puts into a checkpoint, {name}")
    for name, value in model.items():
        if not isinstance(value, torch.Tensor):
            refuse_unreadable(value, f"get_extra_state() of the model, {name}")
    return {"model": model, "optimizer": {"optimizers": optimizers}, "lightning": state}


def restored(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inverse of `dumped`: the content of a checkpoint, in Lightning's form.

    The tensors of the model are read, because hooks of the module may look at them.
    """
    return {
        **tensors["lightning"],
        "state_dict": whole(tensors["model"]),
        "optimizer_states": tensors["optimizer"]["optimizers"],
    }


def refuse_other_step(tensors: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a checkpoint that was made with dtrain's step."""
    if "lightning" not in tensors:
        raise CheckpointError(
            "it was made with dtrain's step, but this training uses Lightning's own loops: use "
            "--set lightning.step=dtrain",
            code="lightning.checkpoint-of-other-step",
        )


def _set_position(loop: dict[str, Any], *, mid_epoch: bool) -> None:
    """Set the counters so that they show whether the epoch is over, in any of Lightning's hooks.

    With `max_steps`, Lightning's own restart would count the batches of an ended epoch as those
    of the next, and end that epoch at once. An epoch that `max_steps` cuts counts as complete.
    """
    for count in loop["epoch_progress"].values():
        done = count["started"] - mid_epoch
        count["processed"] = count["completed"] = done
    if not mid_epoch:
        progress = loop["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False


class ExactResults(QuietResults):
    """The logged values of a module, combined over all ranks at the end of a loader.

    Lightning uses each rank's own mean unless a module sets `sync_dist`. Here the mean over the
    samples of all ranks is known on all of them before any hook reads it. A rank that has not
    logged a value has no part in its mean, and does not make the others wait.
    """

    def __init__(self, training: bool, trainer: pl.Trainer) -> None:
        super().__init__(training, trainer)
        self._before: dict[str, tuple[float, float]] = {}
        """The values and weights of an interrupted epoch by key, until the key is logged again."""

    def __setitem__(self, key: str, metric: Any) -> None:
        super().__setitem__(key, metric)
        if key in self._before:
            value, weight = self._before.pop(key)
            metric.value = torch.tensor(value, dtype=metric.value.dtype)
            if metric.meta.is_mean_reduction:
                metric.cumulated_batch_size = torch.tensor(round(weight))
            metric._update_count = 1

    def combine(self) -> None:
        """Combine the values that were logged for the epoch. Called by all ranks."""
        sums = self._sums()
        for key, metric in self._of_epoch().items():
            value, weight = sums[key]
            if metric.meta.is_mean_reduction:
                value = value / weight if weight else float("nan")
            metric._computed = torch.tensor(
                value, dtype=metric.value.dtype, device=metric.value.device
            )

    def state(self) -> dict[str, list[float]]:
        """Return each key's value and weight so far, over all ranks. Called by all ranks."""
        return {key: [value, weight] for key, (value, weight) in self._sums().items()}

    def load(self, state: Mapping[str, Any], rank: int) -> None:
        """Continue from a state on rank 0 only, because it is the state of all ranks."""
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
        return combined(collectives.gather_to_all(mine))
