"""dtrain's own training loop."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

from dtrain.run.failures import set_step
from dtrain.train.checks.checks import Rollback
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.data import loader_process
from dtrain.train.faults import Injector
from dtrain.train.loop.task_state import Kept
from dtrain.train.loop.training import Metrics, Training

logger = logging.getLogger(__name__)


class NativeTrainer:
    """Trains a task as its job defines it, the same under every strategy and world size."""

    def __init__(self, context: TrainContext) -> None:
        self._context = context

    def run(self) -> TrainResult:
        """Train from the newest checkpoint, or from the start, to the end or until asked to stop.

        Raises:
            CheckpointError: a checkpoint cannot be written, or there are checkpoints but none of
                them can be used.
            DtrainError: the task broke its contract, or a check failed; the message has the
                location.
        """
        injector = Injector(self._context)
        kept = Kept(self._context)
        rollbacks = 0
        while True:
            training = self.begin(injector.seeded(self._context), injector, kept)
            try:
                return self.drive(training)
            except Rollback as rollback:
                rollbacks += 1
                if rollbacks > self._context.spec.checks.max_rollbacks:
                    raise rollback.error from None
                logger.warning("%s\ngoing back to the newest checkpoint", rollback)
                training.finish_saving()
            except (Exception, SystemExit) as error:
                explained = loader_process.explained(error)
                set_step(explained or error, training.progress.step + 1)
                if explained is None:
                    raise
                raise explained from error
            finally:
                training.close()
                del training
                gc.collect()  # no DDP may outlive its process group: 6-8 % of gloo exits hang

    def begin(self, context: TrainContext, injector: Injector, kept: Kept) -> Any:
        """Return a training at its start or at its newest checkpoint; `drive` receives it."""
        return Training(context, injector, kept, self.evaluation_wrapper)

    def evaluation_wrapper(self, evaluate: Callable[[], Metrics | None]) -> Metrics | None:
        """Call an evaluation. Other trainers do more before and after it."""
        return evaluate()

    def drive(self, training: Any) -> TrainResult:
        complete = training.begin()
        if complete:
            for step in training.steps():
                complete = training.step(*step)
                if not complete:
                    break
        result: TrainResult = training.end(complete=complete)
        return result
