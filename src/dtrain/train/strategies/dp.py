"""`dp`: nn.DataParallel, one process with one replica per device."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.train.context import TrainContext
from dtrain.train.loss import LossModule, LossParts
from dtrain.train.strategies.base import Strategy
from dtrain.train.strategies.replicas import CpuDataParallel, GatherableLoss, check_scatterable


class DataParallelStrategy(Strategy):
    """Each micro-batch is cut into one part per replica; their sums are added on the first.

    Adding sums and weights (not averaging the replicas' means) keeps a ragged last part exact.
    BatchNorm sees one part at a time, and the first replica's statistics are the ones that stay.

    Raises:
        UsageError: more than one process was started.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._require_one_process("dp")
        self._parallel: torch.nn.Module | None = None

    def prepare(self, module: LossModule) -> None:
        """Wrap the loss for the devices of this process."""
        super().prepare(module)
        gatherable = GatherableLoss(module)
        replicas = self.context.local_devices
        if self.context.device.type == "cuda":
            self._parallel = torch.nn.DataParallel(gatherable, device_ids=list(range(replicas)))
        else:
            self._parallel = CpuDataParallel(gatherable, replicas)

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        """(sum, weight) over all replicas of one micro-batch."""
        assert self._parallel is not None
        check_scatterable(batch, num_samples)
        sums, weights = self._parallel(batch, torch.arange(num_samples))
        return sums.sum(), weights.sum()

    def close(self) -> None:
        """Let go of the wrapped model."""
        super().close()
        self._parallel = None
