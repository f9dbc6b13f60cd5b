"""Lightning's callbacks: how they join a Trainer, and which of them need Lightning's own loops."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import TunerExit, is_overridden, pl

_LOOP_HOOKS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
"""Hooks of a callback that dtrain's step does not call."""

_SCHEDULES = ("StochasticWeightAveraging", "GradientAccumulationScheduler")
_TUNERS = ("LearningRateFinder", "BatchSizeFinder")
"""Callbacks that train before the training."""
_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")
"""Callbacks that keep a copy of the model; the second is new in Lightning 2.6."""


class StopFit(TunerExit):
    """Ends a fit between two steps: Lightning tears down, and calls no end hooks."""


def why_callback_needs_loops(callback: pl.Callback) -> str | None:
    """Return why a callback needs Lightning's own loops; None if dtrain's step is enough."""
    name = type(callback).__name__
    if isinstance(callback, _kinds(_SCHEDULES)):
        return f"{name} changes the learning rate by its own schedule"
    for hook in _LOOP_HOOKS:
        if is_overridden(hook, callback, pl.Callback):
            return f"callback {name} overrides {hook}()"
    return None


def refuse_callbacks(callbacks: Sequence[pl.Callback], *, sharded: bool) -> None:
    """Refuse callbacks that work neither with dtrain's step nor with Lightning's loops.

    Args:
        callbacks: the callbacks of a Trainer.
        sharded: whether each process holds a part of the model.

    Raises:
        UsageError: a callback trains before the training, which no checkpoint would contain, or
            copies the whole model although it is sharded.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, _kinds(_TUNERS)):
            raise UsageError(
                f"{name} trains the model before the training, which a resume could not repeat: "
                "run it separately, with Lightning's Trainer, and write its result into the job",
                code="lightning.tuner-callback",
            )
        if sharded and isinstance(callback, _kinds(_AVERAGES)):
            raise UsageError(
                f"{name} copies the model, but with strategy 'fsdp' each process holds only a "
                "part of it; use strategy 'ddp'",
                code="lightning.average-of-parts",
            )


def _kinds(names: Iterable[str]) -> tuple[type, ...]:
    return tuple(getattr(pl.callbacks, each) for each in names if hasattr(pl.callbacks, each))


def add_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Add callbacks to a Trainer, in the order that Lightning requires."""
    ordered = trainer._callback_connector._reorder_callbacks([*trainer.callbacks, *callbacks])
    trainer.callbacks = ordered


def name_callback(error: Exception, own: pl.Callback) -> None:
    """Add a note to an error that names the Lightning callback and the method that raised it.

    Args:
        error: the error.
        own: dtrain's callback, which is not named.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, pl.Callback) and owner is not own:
            error.add_note(f"in {frame.f_code.co_name}() of callback {type(owner).__name__}")
            return
