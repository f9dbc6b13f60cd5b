"""What may be told of a training: the one protocol of callbacks, under every trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Session(Protocol):
    """What a callback sees of a training, and may ask of it."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""

    @property
    def batch_size(self) -> int:
        """Samples of the step that was just done, of all processes."""

    @property
    def evaluation_follows(self) -> bool:
        """Whether an evaluation comes after the step that was just done."""

    @property
    def over(self) -> bool:
        """Whether no step follows, as far as the job says."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def model(self) -> Any:
        """The task's model; to be read."""

    @property
    def optimizer(self) -> Any:
        """Its optimizer."""

    @property
    def run_dir(self) -> Path:
        """The run's directory, for files of one's own (from rank 0)."""

    def log(self, name: str, value: float) -> None:
        """Put a number into the next line of training metrics."""

    def stop(self, reason: str) -> None:
        """End training as complete: after an evaluation or an epoch at once, else after the next
        step.

        It is enough that one process asks.
        """

    def keep_best(self) -> None:
        """Save this step, and keep the checkpoint as `checkpoints/best`. By all processes."""


class Callback:
    """Base of callbacks; override what is wanted.

    Every method is called by all processes at the same moment, between steps, so that it may use
    collectives if all do. What it changes of the model or of the random numbers changes the
    training.
    """

    def on_start(self, session: Session) -> None:
        """Before the first step, after a checkpoint was read."""

    def on_step(self, session: Session, loss: float) -> None:
        """After a step; `loss` is that of the global batch, the same everywhere."""

    def on_epoch(self, session: Session) -> None:
        """After the last step of an epoch."""

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        """After an evaluation, with its metrics, the same everywhere."""

    def on_checkpoint(self, session: Session, folder: Path) -> None:
        """After a checkpoint is on disk."""

    def on_end(self, session: Session) -> None:
        """At the end of a complete training, after the last checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, kept in checkpoints; the same on all processes.

        Tensors, NumPy's arrays and numbers, numbers, str and None, in dicts, lists and tuples;
        each comes back as it is.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class LRMonitor(Callback):
    """Puts the learning rate of every parameter group into the metrics: `lr/0`, `lr/1`, …"""

    def on_step(self, session: Session, loss: float) -> None:
        """Log the rate of each group."""
        for index, group in enumerate(session.optimizer.param_groups):
            session.log(f"lr/{index}", float(group["lr"]))
