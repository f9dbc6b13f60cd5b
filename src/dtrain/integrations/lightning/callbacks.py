"""Lightning's callbacks: how they join a Trainer, and which dtrain's step does not serve."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import TunerExit, is_overridden, pl

_OF_LOOPS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
"""Hooks of a callback around which dtrain's step has nothing to offer."""

_SCHEDULES = ("StochasticWeightAveraging", "GradientAccumulationScheduler")
_TUNERS = ("LearningRateFinder", "BatchSizeFinder")
"""Callbacks that train before the training."""
_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")
"""Those that keep a copy of the model; the second is new in Lightning 2.6."""


class Leave(TunerExit):
    """Ends a fit between two steps: Lightning tears down, and calls no hook of an end."""


def why_not_beside_dtrain(callback: pl.Callback) -> str | None:
    """Why a callback wants Lightning's own loops; None where dtrain's step will do."""
    name = type(callback).__name__
    if isinstance(callback, _kinds(_SCHEDULES)):
        return f"{name} has a schedule of its own"
    for hook in _OF_LOOPS:
        if is_overridden(hook, callback, pl.Callback):
            return f"callback {name} overrides {hook}()"
    return None


def refuse_callbacks(callbacks: Sequence[pl.Callback], *, sharded: bool) -> None:
    """Refuse what cannot be done in either way.

    Args:
        callbacks: of a Trainer.
        sharded: whether each process holds a part of the model.

    Raises:
        UsageError: one trains before the training, of which no checkpoint would know, or puts
            whole parameters beside parts.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, _kinds(_TUNERS)):
            raise UsageError(
                f"{name} trains before the training, which a resume could not repeat: run it by "
                "itself, with Lightning's Trainer, and write what it finds into the job",
                code="lightning.tuner-callback",
            )
        if sharded and isinstance(callback, _kinds(_AVERAGES)):
            raise UsageError(
                f"{name} copies the model, of which with strategy 'fsdp' each process holds a "
                "part; use strategy 'ddp'",
                code="lightning.average-of-parts",
            )


def _kinds(names: Iterable[str]) -> tuple[type, ...]:
    return tuple(getattr(pl.callbacks, each) for each in names if hasattr(pl.callbacks, each))


def add_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Let a Trainer have more of them, in the order that Lightning wants."""
    ordered = trainer._callback_connector._reorder_callbacks([*trainer.callbacks, *callbacks])
    trainer.callbacks = ordered


def name_callback(error: Exception, ours: pl.Callback) -> None:
    """Let an error say in which of Lightning's callbacks it was, and in which method."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, pl.Callback) and owner is not ours:
            error.add_note(f"in {frame.f_code.co_name}() of callback {type(owner).__name__}")
            return
