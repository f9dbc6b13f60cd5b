"""The loader for Lightning's loop: it yields one global batch at a time, one epoch per pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from dtrain.train.data.pipeline import Step
from dtrain.train.loop.training import Training

_ENDLESS = 2**31
"""The length of an epoch of unknown length; such a pass ends with its data."""


class StepLoader:
    """Yields a training's steps in turn; `current` is the next one to do.

    Args:
        training: the training.
        begun: called before the first step, with the number of steps before it in its epoch.
        ended: called when there are no more steps.
        loader: the user's loader, whose attributes this one has. With it, Lightning and its
            callbacks get this rank's first micro-batch of the step. Without it, and if a rank has
            no samples, they get a dict with the step's position.
        ready: prepares the next micro-batch for a training step.
    """

    def __init__(
        self,
        training: Training,
        begun: Callable[[int], None],
        ended: Callable[[], None],
        loader: Any = None,
        ready: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        self._steps = training.steps(hooks=True)
        self._length = training.course.steps_per_epoch
        self._begun = begun
        self._ended = ended
        self._batch_size = training.course.global_batch_size
        self._loader = loader
        self._ready = ready
        self.current: Step | None = None

    def __len__(self) -> int:
        return _ENDLESS if self._length is None else self._length

    def __iter__(self) -> Iterator[Any]:
        for batch, micro_batches, number in self._steps:
            shown: Any = {"step": batch.step, "epoch": batch.epoch, "samples": batch.size}
            if self._loader is not None and number:
                samples, first = next(micro_batches)
                shown = self._ready(first)
                micro_batches = itertools.chain([(samples, shown)], micro_batches)
            if self.current is None:
                self._begun(-(-batch.start // self._batch_size))
            self.current = (batch, micro_batches, number)
            yield shown
            if batch.ends_epoch:
                return
        self._ended()

    def __getattr__(self, name: str) -> Any:
        loader = None if name.startswith("_") else self._loader
        if loader is None:
            raise AttributeError(name)
        return getattr(loader, name)

    def close(self) -> None:
        """Release the remaining steps, and with them the loader processes.

        Lightning's objects form reference cycles, which keep this one alive. Its loader processes
        ignore signals to end, so without this the process would wait for them forever.
        """
        self._steps.close()
        self.current = None
