"""The progress of a training, and when evaluations and checkpoints are due."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import TensorDataset

from dtrain.errors import CheckpointError, DamagedError, DtrainError
from dtrain.job.spec import CheckpointSpec, JobSpec
from dtrain.run import files
from dtrain.train.data.permutation import PERMUTATION_VERSION
from dtrain.train.data.placement import Position
from dtrain.train.tracing import digest


@dataclass
class Progress:
    """The state of a training that is not a tensor."""

    step: int = 0
    """The number of optimizer steps done."""
    position: Position = field(default_factory=Position)
    evaluated_step: int | None = None
    """The step after which the model was last evaluated."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of that evaluation."""
    predicted_step: int | None = None
    """The step after which predictions were last written."""
    stopped_early: bool = False
    feed: dict[str, Any] = field(default_factory=dict)
    """The state of the data pipeline in addition to the position, see `Feed.state_dict`."""

    def counters(self) -> dict[str, Any]:
        """Return the counters of the training, which are the same on all ranks."""
        return {
            "step": self.step,
            "epoch": self.position.epoch,
            "samples consumed": self.position.consumed,
        }

    def to_saved(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the progress as plain JSON, with the identity of the data it belongs to."""
        return {
            "step": self.step,
            "epoch": self.position.epoch,
            "consumed": self.position.consumed,
            "evaluated_step": self.evaluated_step,
            "metrics": {name: _json_number(value) for name, value in self.metrics.items()},
            "predicted_step": self.predicted_step,
            "stopped_early": self.stopped_early,
            "feed": self.feed,
            "data": data,
        }

    @classmethod
    def from_saved(cls, plain: dict[str, Any], data: dict[str, Any]) -> Progress:
        """Return the progress that `to_saved` described.

        Raises:
            CheckpointError: the position belongs to other data or to another order of it, or it
                is not a valid position.
        """
        try:
            saved = files.parse_as(_Saved, json.dumps(plain), "progress.json")
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
            remedy = f"with {' '.join(back)} it fits" if back else "its position is not valid here"
            raise CheckpointError(
                f"it was made with other data ({'; '.join(changed)}); {remedy}",
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


def _json_number(value: float) -> float | str:
    """Return a value that JSON can hold and that `float` turns back into the number."""
    return value if math.isfinite(value) else str(value)


_FIELDS = {"seed": "seed", "shuffle": "data.shuffle"}
"""The parts of a data identity that are fields of job.yaml, and the names of these fields."""


def refuse_to_end_before(done: int, end: int | None, unit: str = "step") -> None:
    """Raise if the checkpoint is later than the end of training, in steps or complete epochs."""
    if end is not None and done > end:
        raise DtrainError(
            f"the checkpoint is of {unit} {done}, but the training ends after {unit} {end}; "
            f"set a later end, for example --set train.{unit}s={2 * done}, or launch a new run",
            code="run.end-passed",
        )


def data_identity(
    spec: JobSpec, dataset: Any, num_samples: int | None, order: str | None = None
) -> dict[str, Any]:
    """Return everything that the meaning of a position depends on.

    A data set may have its own `fingerprint`, as an attribute or a method. The fingerprint of a
    TensorDataset is the digest of its tensors, which takes 0.27 ms for a million numbers.
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

    def evaluation_due(self, progress: Progress) -> bool:
        spec = self._spec.eval
        return _due(progress, spec.every_steps, spec.every_epochs)

    def save_due(self, progress: Progress) -> bool:
        spec = self._spec.checkpoint
        return _due(progress, spec.every_steps, spec.every_epochs)


class SaveClock:
    """Says when a checkpoint is due by this process's clock.

    Args:
        spec: the time between checkpoints.
    """

    def __init__(self, spec: CheckpointSpec) -> None:
        self._mtbf_s = spec.mtbf if spec.every == "auto" else None
        self.every_s = None if spec.every == "auto" else spec.every
        """The training time between checkpoints in seconds, if there is one."""
        if self._mtbf_s is not None:
            self.every_s = best_interval(_PRESUMED_COST_S, self._mtbf_s)
        self._started = time.monotonic()

    @property
    def chooses(self) -> bool:
        """Whether the time depends on the measured cost."""
        return self._mtbf_s is not None

    @property
    def overdue(self) -> bool:
        return self.every_s is not None and time.monotonic() - self._started >= self.every_s

    def restart(self, cost_s: float | None) -> None:
        """Restart it after a checkpoint.

        Args:
            cost_s: how long training has stopped for a checkpoint until now, on average; None if
                that is not known.
        """
        self._started = time.monotonic()
        if self._mtbf_s is not None and cost_s is not None:
            self.every_s = best_interval(cost_s, self._mtbf_s)


_PRESUMED_COST_S = 1.0
"""How long a checkpoint is presumed to stop training until one is measured."""


def best_interval(cost_s: float, mtbf_s: float) -> float:
    """Return the training time between checkpoints with which the least time is lost, in seconds.

    Time is lost to checkpoints, and after a failure to the steps since the last one. The estimate
    is of J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps,
    Future Generation Computer Systems 22 (2006), equation 37. Its first term is that of
    J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of
    the ACM 17 (1974).

    Args:
        cost_s: how long training stops for a checkpoint, in seconds.
        mtbf_s: the mean time between failures, in seconds.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - cost_s


def _due(progress: Progress, every_steps: int | None, every_epochs: int | None) -> bool:
    if every_steps is not None and progress.step % every_steps == 0:
        return True
    at_epoch_end = progress.position.consumed == 0
    return every_epochs is not None and at_epoch_end and progress.position.epoch % every_epochs == 0
