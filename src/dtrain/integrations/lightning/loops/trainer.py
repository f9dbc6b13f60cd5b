"""A LightningModule under Lightning's own loops."""

from __future__ import annotations

from typing import Any

from dtrain.integrations.lightning.loops.fit import Fit
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.faults import Injector
from dtrain.train.loop.native import NativeTrainer
from dtrain.train.loop.task_state import Kept


class LoopsTrainer(NativeTrainer):
    """A trainer in which Lightning runs its loops, hooks, optimization and precision.

    Optimization is automatic or manual. dtrain distributes the samples, compares the ranks, saves
    and resumes, and stops cleanly.
    """

    def begin(self, context: TrainContext, injector: Injector, kept: Kept) -> Fit:
        return Fit(context, injector)

    def drive(self, training: Any) -> TrainResult:
        result: TrainResult = training.run()
        return result
