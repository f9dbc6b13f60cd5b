"""Reports of a training: log lines, metrics and events, written by rank 0."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.data.placement import EpochPlan, GlobalBatch
from dtrain.train.loop.progress import Progress
from dtrain.train.metrics.events import Events
from dtrain.train.metrics.writer import Metrics

logger = logging.getLogger(__name__)

_MAX_RANKS = 16
"""With more ranks, a log line shows a range instead of a number per rank."""


class Report:
    """Writes the reports on rank 0, and nothing on the other ranks."""

    def __init__(self, context: TrainContext, events: Events) -> None:
        self._context = context
        self._events = events
        self._total_steps: int | None = None
        self._active = context.ranks.is_rank_zero
        self._metrics = Metrics(context.run, context.spec, active=self._active)
        self._first = True
        self._without_line: tuple[int, int, Callable[[], dict[str, float]]] | None = None
        """The step, epoch and metrics of the last step; None once its line is written."""
        self._noted: dict[str, float] = {}
        self._samples = 0
        self._since = self._step_ended = time.monotonic()
        """When the measured time began, without that of steps that compiled; the last step's end.
        """

    def started(
        self,
        progress: Progress,
        course: EpochPlan,
        *,
        resumed: bool,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Report the start, before the first step.

        Args:
            progress: the progress so far.
            course: the steps of all epochs.
            resumed: whether the training continues from a checkpoint.
            data: the identity of the training data, where it is known already.
        """
        spec, ranks, device = self._context.spec, self._context.ranks, self._context.device
        self._total_steps = course.total_steps
        self._events.write(
            "training_started",
            total_steps=course.total_steps,
            total_epochs=course.total_epochs,
            world_size=ranks.world_size,
            strategy=spec.strategy,
            resumed_from=progress.step if resumed else None,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            data=data,
        )
        self._metrics.begin(progress.step)
        self._since = self._step_ended = time.monotonic()
        logger.info(
            "rank %d of %d, %s: %s, batch %d, %s",
            ranks.rank, ranks.world_size, spec.strategy, _length(course, progress.step + 1),
            spec.train.global_batch_size, spec.train.precision,
        )  # fmt: skip

    def keep_names(self, split: str, names: Iterable[str]) -> None:
        """Let loggers show these metrics without `train/` or `eval/`: the user named them."""
        self._metrics.own_names.update((split, name) for name in names)

    def note(self, name: str, value: float) -> None:
        """Add a number to the next line of training metrics. A later value replaces it."""
        self._noted[name] = value

    def due(self, step: int) -> bool:
        """Return whether a line of metrics is written after this step.

        It is written after the first, the last and every `log.every_steps`-th step.
        """
        every = self._context.spec.log.every_steps
        return self._first or step % every == 0 or step == self._total_steps

    def step(
        self,
        step: int,
        epoch: int,
        samples: int,
        values: Callable[[], dict[str, float]],
        *,
        compiled: bool = False,
    ) -> None:
        """Write a line of metrics when one is due. All ranks call it after every step.

        Args:
            step: the number of the step that was done, counted from 1.
            epoch: the epoch of the step, counted from 0.
            samples: the number of samples of all ranks in the step.
            values: returns the metrics; loss and lr are shown first. All ranks call it when a line
                is due, so it may gather values from all ranks.
            compiled: whether a rank compiled code since the last step. The time since then, and the
                samples of this step, do not count for the speed.
        """
        now = time.monotonic()
        if compiled:
            self._since += now - self._step_ended
        else:
            self._samples += samples
        self._step_ended = now
        self._without_line = step, epoch, values
        if self.due(step):
            self.last_step()

    def last_step(self) -> None:
        """Write the line of the last step, unless it has one. All ranks call it."""
        if self._without_line is None:
            return
        (step, epoch, values), self._without_line = self._without_line, None
        self._first = False
        metrics = values()
        if not self._active:
            return
        now = time.monotonic()
        speed: dict[str, float] = {}
        if self._samples:
            rate = self._samples / max(now - self._since, 1e-9)
            speed = {"samples_per_second": round(rate, 1)}
        head: dict[str, float] = {n: metrics.pop(n) for n in ("loss", "lr") if n in metrics}
        metrics = {**head, **speed, **metrics, **self._noted}
        self._noted.clear()
        self._metrics.write("train", step, epoch, metrics)
        logger.info(
            "step %d/%s epoch %d: %s",
            step, self._total_steps or "?", epoch, _listed(metrics),
        )  # fmt: skip
        self._samples, self._since = 0, now

    def epoch_ended(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Write the metrics of a library, for the epoch that has just ended."""
        if self._active and metrics:
            epoch = _epoch_of(progress)
            self._metrics.write("train", progress.step, epoch, metrics)
            logger.info("epoch %d after step %d: %s", epoch, progress.step, _listed(metrics))

    def epoch_read(self, batch: GlobalBatch, samples: list[int] | None) -> None:
        """Report how many samples each rank read in an epoch.

        `samples` is None unless each rank reads its own shard of a stream.
        """
        if samples is None:
            return
        self._events.write("epoch_read", epoch=batch.epoch, samples=samples)
        counts = ", ".join(f"rank {rank} read {number}" for rank, number in enumerate(samples))
        if len(samples) > _MAX_RANKS:
            counts = f"each rank read {min(samples)} to {max(samples)}"
        logger.info("epoch %d: %d samples, %s", batch.epoch, sum(samples), counts)

    def evaluated(self, progress: Progress) -> None:
        self.measured("eval", progress, progress.metrics)

    def measured(self, split: str, progress: Progress, metrics: dict[str, float]) -> None:
        """Write the metrics of a split, measured after the steps that are done."""
        if self._active:
            self._metrics.write(split, progress.step, _epoch_of(progress), metrics)
            what = "evaluation" if split == "eval" else split
            logger.info("%s after step %d: %s", what, progress.step, _listed(metrics))

    def predicted(self, progress: Progress, num_samples: int) -> None:
        path = self._context.run.predictions
        self._events.write(
            "predictions_written", step=progress.step, file=path.name, samples=num_samples
        )
        logger.info(
            "predictions after step %d for %d samples: %s", progress.step, num_samples, path
        )

    def left(self, progress: Progress, reason: str, rank: int) -> None:
        self._metrics.outcome = "stopped"
        self._events.write("stopped", reason=reason, rank=rank, step=progress.step)
        logger.warning("stopping after step %d: %s (on rank %d)", progress.step, reason, rank)

    def finished(self, result: TrainResult) -> None:
        self._metrics.outcome = "finished"
        self._events.write(
            "finished",
            metrics=result.metrics,
            steps=result.steps,
            seconds=round(result.seconds, 3),
            stopped_early=result.stopped_early,
            parameters_sha256=result.parameters_sha256,
        )
        profile = self._context.spec.profile
        if profile is not None and result.steps < profile.steps[0]:
            logger.warning("profile: step %d was not reached", profile.steps[0])
        logger.info("finished: %d steps, %.1f s in this process", result.steps, result.seconds)

    def close(self) -> None:
        self._metrics.close()


def _epoch_of(progress: Progress) -> int:
    """Return the epoch of the last step, counted from 0."""
    position = progress.position
    return max(0, position.epoch if position.consumed else position.epoch - 1)


def _length(course: EpochPlan, first: int) -> str:
    """Describe the length of training from its first step here, as far as it is known."""
    if course.total_steps is None:
        return f"from step {first} on, epochs of a stream"
    steps = f"steps {first}-{course.total_steps}"
    if course.num_samples is None:
        return steps
    return f"{steps}, {course.steps_per_epoch} per epoch of {course.num_samples} samples"


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())
