"""What a LightningModule logs: exact over all ranks, whatever their batches' sizes.

Lightning's own `sync_dist` takes the mean of the ranks' means, and needs all ranks to log as often.
Here each value is a sum and a weight until the end; then the ranks speak to each other once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torchmetrics import Metric

from dtrain.errors import DtrainError
from dtrain.task import Loss
from dtrain.train import collectives
from dtrain.train.trainers.lightning.library import pl

Means = dict[str, tuple[float, float]]
"""By name: sum and weight."""


class Logged:
    """Stands in for `self.log` of a module while it trains or is evaluated."""

    def __init__(self, module: pl.LightningModule, world_size: int) -> None:
        self._module = module
        self._world_size = world_size
        self._original = module.log
        self._stage = ""
        self.samples = 0
        """In the batch that is looked at."""
        self._epoch: Means = {}
        self._evaluation: Means = {}
        self._batch: dict[str, Loss | torch.Tensor] = {}
        self._metrics: dict[str, Metric] = {}
        self.batch_index = 0
        module.log = self._log

    @contextlib.contextmanager
    def training(self, batch_index: int) -> Iterator[None]:
        """Around a step."""
        self._stage, self.batch_index = "train", batch_index
        try:
            yield
        finally:
            self._stage = ""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation, which may be inside a step."""
        before, self._stage = self._stage, "evaluation"
        try:
            yield
        finally:
            self._stage = before

    @contextlib.contextmanager
    def batch(self) -> Iterator[dict[str, Loss | torch.Tensor]]:
        """Around a validation step: what it logs."""
        logged: dict[str, Loss | torch.Tensor] = {}
        self._batch = logged
        self._stage = "batch"
        try:
            yield logged
        finally:
            self._stage = "evaluation"

    def of_epoch(self) -> dict[str, float]:
        """Means over all that was logged with `on_epoch` in training steps; then it is forgotten.

        Called by all ranks.
        """
        found, self._epoch = self._epoch, {}
        return _means(collectives.gather_to_all(found))

    def of_evaluation(self) -> dict[str, float]:
        """What the end of an evaluation says beyond its batches. Called by all ranks."""
        found, self._evaluation = self._evaluation, {}
        metrics = _means(collectives.gather_to_all(found))
        names = {name for each in collectives.gather_to_all(list(self._metrics)) for name in each}
        for name in sorted(names):
            metrics[name] = float(self._of_name(name).compute())
            self._of_name(name).reset()
        self._metrics = {}
        return metrics

    def _of_name(self, name: str) -> Metric:
        if name not in self._metrics:
            raise DtrainError(
                f"the metric {name} was logged on some ranks only; every rank needs a sample to "
                "evaluate for an object of torchmetrics"
            )
        return self._metrics[name]

    def _log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        if not self._stage:
            self._original(name, value, *args, **options)
        elif self._stage == "train":
            self._log_step(name, value, *args, **options)
        elif isinstance(value, Metric):
            self._metrics[name] = value
        elif self._stage == "batch":
            self._batch[name] = _weighted(name, value, options)
        else:
            self._evaluation[name] = _number(value), 1.0

    def _log_step(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Of a step now and from this rank, as Lightning has it; of an epoch at its end."""
        if isinstance(value, Metric):
            self._original(name, value, *args, **options)
            return
        size = options.pop("batch_size", None) or self.samples
        if options.pop("on_epoch", None):
            weight = float(size)
            total, before = self._epoch.get(name, (0.0, 0.0))
            self._epoch[name] = total + _number(value) * weight, before + weight
        options |= {"on_epoch": False, "sync_dist": False, "batch_size": size}
        if options.setdefault("on_step", True):
            self._original(name, value, *args, **options)


def _weighted(name: str, value: Any, options: Mapping[str, Any]) -> Loss | torch.Tensor:
    reduction = options.get("reduce_fx", "mean")
    if reduction not in ("mean", torch.mean):
        raise DtrainError(
            f"self.log({name!r}, reduce_fx={reduction}): an evaluation has means here; log the "
            "mean over the batch, or an object of torchmetrics"
        )
    tensor = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    size = options.get("batch_size")
    return tensor if size is None else Loss(tensor * size, float(size))


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _means(everyone: list[Means]) -> dict[str, float]:
    sums: Means = {}
    for means in everyone:
        for name, (total, weight) in means.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + weight
    return {name: total / weight for name, (total, weight) in sums.items() if weight}
