"""The callback protocol, which is the same under every trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Session(Protocol):
    """The training as a callback sees it, and the requests that a callback can make."""

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""

    @property
    def epoch(self) -> int:
        """The number of complete epochs."""

    @property
    def batch_size(self) -> int:
        """The number of samples in the step that was just done, over all processes."""

    @property
    def evaluation_follows(self) -> bool:
        """True if an evaluation follows the step that was just done."""

    @property
    def over(self) -> bool:
        """True if all steps that the job asks for are done."""

    @property
    def rank(self) -> int:
        """The rank of this process."""

    @property
    def model(self) -> Any:
        """The task's model, for reading."""

    @property
    def optimizer(self) -> Any:
        """The task's optimizer."""

    @property
    def run_dir(self) -> Path:
        """The run directory. A callback can write its own files there, from rank 0."""

    def log(self, name: str, value: float) -> None:
        """Add a number to the next line of training metrics."""

    def stop(self, reason: str) -> None:
        """End the training as complete; a call on one process is enough.

        After an evaluation or an epoch it ends at once, otherwise after the next step.
        """

    def keep_best(self) -> None:
        """Save this step as `checkpoints/best`. All processes must call this."""


class Callback:
    """The base class of callbacks; override the methods that you need.

    All processes call each method at the same moment, between steps. So a method may use
    collectives if it does so on all processes. Changes to the model or to the random numbers
    change the training.
    """

    def on_start(self, session: Session) -> None:
        """Called before the first step, after a checkpoint was read."""

    def on_step(self, session: Session, loss: float) -> None:
        """Called after a step. `loss` is the loss of the global batch, the same on all ranks."""

    def on_epoch(self, session: Session) -> None:
        """Called after the last step of an epoch."""

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        """Called after an evaluation with its metrics, which are the same on all ranks."""

    def on_checkpoint(self, session: Session, folder: Path) -> None:
        """Called when a checkpoint is on disk.

        A large one is written while training goes on, so this may be some steps after its own.
        """

    def on_end(self, session: Session) -> None:
        """Called at the end of a complete training, after the last checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints; it must be the same on all processes.

        It may contain tensors, NumPy's arrays and numbers, numbers, str and None, in dicts, lists
        and tuples. Each value is restored unchanged.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""


class LRMonitor(Callback):
    """Adds the learning rate of every parameter group to the metrics: `lr/0`, `lr/1`, …"""

    def on_step(self, session: Session, loss: float) -> None:
        """Log the learning rate of each group."""
        for index, group in enumerate(session.optimizer.param_groups):
            session.log(f"lr/{index}", float(group["lr"]))
