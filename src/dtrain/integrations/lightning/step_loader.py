"""What Lightning's loop takes for batches: one global batch a turn, one epoch a pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from dtrain.train.data.pipeline import Step
from dtrain.train.loop.training import Training

_ENDLESS = 2**31
"""Length of an epoch that nobody knows the length of; such a pass ends when it ends."""


class StepLoader:
    """Hands out a training's steps in turn; `current` is the one to be done.

    Args:
        training: whose steps.
        begun: called before the first step, with the number of those before it in its epoch.
        ended: called when there are no more.
        loader: the user's, whose attributes this one has; Lightning, and so its callbacks, are then
            given this rank's first micro-batch of the step. Without one, and where a rank has no
            samples, the step's place in words.
        ready: makes of a micro-batch what a training step is given, and hears that it is the next.
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
        """Let go of the steps that nobody takes any more.

        Lightning's objects refer to each other in circles, and so keep this one; its loader
        processes, which leave a signal to end to us, would be waited for for ever.
        """
        self._steps.close()
        self.current = None
