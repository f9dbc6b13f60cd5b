"""How far a training has come, and what is due when."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import TensorDataset

from dtrain.errors import CheckpointError, DamagedError, DtrainError
from dtrain.job.spec import JobSpec
from dtrain.run import files
from dtrain.train.data.permutation import PERMUTATION_VERSION
from dtrain.train.data.placement import Position
from dtrain.train.tracing import digest


@dataclass
class Progress:
    """Everything about a training that is not a tensor."""

    step: int = 0
    """Optimizer steps done."""
    position: Position = field(default_factory=Position)
    evaluated_step: int | None = None
    """The step after which the model was last evaluated."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of that evaluation."""
    predicted_step: int | None = None
    """The step after which predictions were last written."""
    stopped_early: bool = False
    feed: dict[str, Any] = field(default_factory=dict)
    """What the data needs besides the position, see `Feed.state_dict`."""

    def counters(self) -> dict[str, Any]:
        """The place in the training, which is the same on all ranks."""
        return {
            "step": self.step,
            "epoch": self.position.epoch,
            "samples consumed": self.position.consumed,
        }

    def to_saved(self, data: dict[str, Any]) -> dict[str, Any]:
        """As plain JSON, with the identity of the data that the position is in."""
        return {
            "step": self.step,
            "epoch": self.position.epoch,
            "consumed": self.position.consumed,
            "evaluated_step": self.evaluated_step,
            "metrics": {name: _told(value) for name, value in self.metrics.items()},
            "predicted_step": self.predicted_step,
            "stopped_early": self.stopped_early,
            "feed": self.feed,
            "data": data,
        }

    @classmethod
    def from_saved(cls, told: dict[str, Any], data: dict[str, Any]) -> Progress:
        """The inverse of `to_saved`.

        Raises:
            CheckpointError: the position was in other data, or in another order of it; or it is
                no such position.
        """
        try:
            saved = files.parse_as(_Saved, json.dumps(told), "progress.json")
        except DamagedError as error:
            raise CheckpointError(
                f"its position cannot be used: {error.why}", code="checkpoint.bad-position"
            ) from None
        changed = [
            f"{key} was {saved.data.get(key)}, is {value}"
            for key, value in data.items()
            if saved.data.get(key) != value
        ]
        if changed:
            back = [
                f"--set {field}={json.dumps(saved.data[key])}"
                for key, field in _FIELDS.items()
                if key in saved.data and saved.data[key] != data.get(key)
            ]
            mend = f"with {' '.join(back)} it fits" if back else "its position means nothing here"
            raise CheckpointError(
                f"it is of other data ({'; '.join(changed)}); {mend}",
                code="checkpoint.other-data",
            )
        size = data.get("num_samples")
        if saved.step < 0 or saved.epoch < 0 or not 0 <= saved.consumed <= (size or math.inf):
            raise CheckpointError(
                f"its position cannot be used: step {saved.step}, epoch {saved.epoch}, sample "
                f"{saved.consumed} of {size}",
                code="checkpoint.bad-position",
            )
        return cls(
            step=saved.step,
            position=Position(saved.epoch, saved.consumed),
            evaluated_step=saved.evaluated_step,
            metrics=saved.metrics,
            predicted_step=saved.predicted_step,
            stopped_early=saved.stopped_early,
            feed=saved.feed,
        )


@dataclass(frozen=True)
class _Saved:
    step: int
    epoch: int
    consumed: int
    evaluated_step: int | None
    metrics: dict[str, float]
    predicted_step: int | None
    stopped_early: bool
    feed: dict[str, Any]
    data: dict[str, Any]


def _told(value: float) -> float | str:
    """A number as JSON takes it, and `float` reads it again."""
    return value if math.isfinite(value) else str(value)


_FIELDS = {"seed": "seed", "shuffle": "data.shuffle"}
"""What of a data's identity is written in job.yaml, and where."""


def refuse_to_end_before(done: int, end: int | None, unit: str = "step") -> None:
    """Refuse a course that a checkpoint is past, in steps or in epochs that are complete."""
    if end is not None and done > end:
        raise DtrainError(
            f"the checkpoint is of {unit} {done}, and the training is to end after {unit} {end}; "
            f"give it a later end, for example --set train.{unit}s={2 * done}, or launch a new run",
            code="run.end-passed",
        )


def data_identity(
    spec: JobSpec, dataset: Any, num_samples: int | None, order: str | None = None
) -> dict[str, Any]:
    """What a position depends on. A data set may add a `fingerprint` of its own, or a method;
    that of a TensorDataset is the digest of its tensors, 0.27 ms for a million numbers.
    """
    fingerprint = getattr(dataset, "fingerprint", None)
    if fingerprint is None and type(dataset) is TensorDataset:
        fingerprint = digest.of_tensors(dataset.tensors)
    if callable(fingerprint):
        fingerprint = fingerprint()
    return {
        "num_samples": num_samples,
        "fingerprint": None if fingerprint is None else str(fingerprint),
        "seed": spec.seed,
        "shuffle": spec.data.shuffle,
        "permutation_version": PERMUTATION_VERSION,
        "order": order,
    }


class Schedule:
    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._last_save = time.monotonic()

    def evaluation_due(self, progress: Progress) -> bool:
        spec = self._spec.eval
        return _due(progress, spec.every_steps, spec.every_epochs)

    def save_due(self, progress: Progress) -> bool:
        spec = self._spec.checkpoint
        return _due(progress, spec.every_steps, spec.every_epochs)

    def save_overdue(self) -> bool:
        """Whether this process's clock asks for a checkpoint; only rank 0's counts."""
        every = self._spec.checkpoint.every
        return every is not None and time.monotonic() - self._last_save >= every

    def saved(self) -> None:
        """Restart the clock of `save_overdue`."""
        self._last_save = time.monotonic()


def _due(progress: Progress, every_steps: int | None, every_epochs: int | None) -> bool:
    if every_steps is not None and progress.step % every_steps == 0:
        return True
    at_epoch_end = progress.position.consumed == 0
    return every_epochs is not None and at_epoch_end and progress.position.epoch % every_epochs == 0
