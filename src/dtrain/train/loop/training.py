"""One training in one process: everything that a loop drives, step by step."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from dtrain import catalog
from dtrain.train import collectives
from dtrain.train.checkpoint.state import parameters_sha256
from dtrain.train.checks import initial_state
from dtrain.train.checks.checks import Checks, position_numbers
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.data.pipeline import Feed, Step
from dtrain.train.data.placement import EpochPlan, GlobalBatch
from dtrain.train.faults.inject import Injector
from dtrain.train.loop import build
from dtrain.train.loop.added_groups import watch_groups
from dtrain.train.loop.callbacks import Callbacks
from dtrain.train.loop.checkpointing import Saver
from dtrain.train.loop.predictions import Predictions, predicts
from dtrain.train.loop.progress import Progress, Schedule, refuse_to_end_before
from dtrain.train.loop.reporting import Report
from dtrain.train.loop.step import Parts, StepOutcome, TrainStep
from dtrain.train.loop.task_state import Kept
from dtrain.train.metrics.events import Events
from dtrain.train.strategies.base import Strategy

logger = logging.getLogger(__name__)


Evaluation = Callable[[], dict[str, float] | None]


class Training:
    """One training in one process, from set-up to result."""

    def __init__(self, context: TrainContext, injector: Injector, kept: Kept) -> None:
        self._started = time.monotonic()
        self._context = context
        spec = context.spec
        initial_state.compare_surroundings(context.task, spec.seed)
        self._strategy: Strategy = catalog.load("strategy", spec.strategy)(context)
        self._parts = build.build_parts(context, self._strategy)
        self._data = build.train_feed(context)
        self._data.meets = self._strategy.meets_in_forward
        self._evaluator = build.make_evaluators(context)
        self._schedule = Schedule(spec)
        self._events = events = Events(context.run, context.ranks, context.attempt)
        self._report = Report(context, events, self._data.course)
        evaluates = self._evaluator is not None
        self.callbacks = Callbacks(context, self._parts, self._report.note, evaluates=evaluates)
        self.callbacks.view.keep_best = self._keep_best
        self._kept = kept
        kept.begin(self._parts.model, self.callbacks.each)
        identity = build.feed_identity(self._data)
        self._saver = Saver(context, self._parts, self.callbacks, kept, identity, events)
        resumed = self._saver.resume()
        self._progress = resumed or Progress()
        total = self._data.course.total_steps
        refuse_to_end_before(self._progress.step, total)
        build.tell_of_parts(self._parts, total, context, events)
        self._data.load_state_dict(self._progress.feed)
        self._strategy.prepare(self._parts.loss)
        watch_groups(self._parts.optimizer, self._parts.model)
        subject = self._parts.subject(lambda: position_numbers(self._progress), kept.leaves)
        self.around_evaluation: Callable[[Evaluation], dict[str, float] | None] = _just
        """Calls an evaluation; for a trainer that has more to do then."""
        self._injector = injector
        injector.begin(context.task, subject, total)
        self._checks = Checks(context, subject, self._parts.loss, self._data, injector, events)
        self._checks.begin(self._progress.step)
        guard = self._checks.finite
        self._step = TrainStep(self._parts, self._strategy, spec.train, context.device, guard)
        self._saver.begin_random(self._progress)
        self._report.started(self._progress, resumed=resumed is not None)

    def begin(self) -> bool:
        """Before the first step: what the process before us still owed; False to leave."""
        self._look_ahead()
        self.callbacks.start(self._progress)
        self._saver.small_states()  # refused now rather than at the first save
        return not self._owes_evaluation() or self._evaluate()

    def end(self, *, complete: bool) -> TrainResult:
        """After the last step: evaluate and save, and leave when asked to.

        Args:
            complete: whether no step asked to leave.
        """
        if not (complete and self._evaluate_at_end()):
            return self._leave()
        self._checks.end(self._progress.step)
        self._save()
        self.callbacks.end()
        result = self._result(parameters_sha256=parameters_sha256(self._parts.model))
        self._report.finished(result)
        return result

    def close(self) -> None:
        """Let go of everything that holds processes, files or the wrapped model."""
        self._strategy.close()
        self._data.close()
        self._report.close()
        if self._evaluator is not None:
            self._evaluator.close()

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        return self._progress

    @property
    def parts(self) -> Parts:
        """What is trained."""
        return self._parts

    @property
    def course(self) -> EpochPlan:
        """All the steps there are."""
        return self._data.course

    @property
    def data(self) -> Feed:
        """What is read."""
        return self._data

    def steps(self, *, hooks: bool = False) -> Generator[Step, None, None]:
        """Each remaining global batch, with this rank's micro-batches of it and their number.

        Each is to be given to `step` before the next is taken. `hooks`: a library's are called
        between two steps.
        """
        recorder, progress = self._context.recorder, self._progress
        if recorder is not None:
            self._data.note_contents()
            self._data.watchers.append(lambda each: recorder.read(each.samples, each.contents))
        split = self._strategy.micro_batches
        watch = self._injector.requests(self._data, progress.step, progress.position, split)
        batches = self._data.batches(progress.step, progress.position, split, watch)
        while not progress.stopped_early:  # a batch that is taken is trained on
            step = next(batches, None)
            if step is None:
                return
            yield step
            if not hooks:
                self._checks.between_steps()

    def step(
        self, batch: GlobalBatch, micro_batches: Iterator[tuple[int, Any]], num_micro_batches: int
    ) -> bool:
        """One optimizer step and what is due after it; False to leave."""
        progress = self._progress
        lr = self._parts.optimizer.param_groups[0]["lr"]
        self._strategy.start_step(batch)
        self._checks.step_begins(batch.step + 1, batch.epoch, idle=num_micro_batches == 0)
        signals = (*self._wishes(), batch.fingerprint)
        outcome = self._step(micro_batches, num_micro_batches, batch.size, signals)
        if not outcome.skipped:
            self._kept.update()
        *wishes, places = outcome.signals
        self._data.agree(batch, places)
        progress.step += 1
        progress.position = batch.after
        self._record(batch.epoch, outcome)
        if outcome.skipped:
            self._events.write("step_skipped", step=progress.step, loss=outcome.loss)
        if batch.ends_epoch:
            self._data.check()
            self._report.epoch_read(batch, self._data.samples_read())
        self._checks.step_ended(progress.step, ends_epoch=batch.ends_epoch)
        self._look_ahead(batch.size)
        ends = self.callbacks.step(outcome.loss, ends_epoch=batch.ends_epoch)
        self._report.step(progress, batch, outcome, lr)
        leave, save, end = wishes
        return self._between_steps(leave, save, end + ends)

    def _look_ahead(self, batch_size: int = 0) -> None:
        """Let callbacks know what comes after the step that was just done."""
        view, progress = self.callbacks.view, self._progress
        view.batch_size = batch_size
        view.over = progress.stopped_early or self._data.course.over(
            progress.step, progress.position.epoch
        )
        due = view.over or self._schedule.evaluation_due(progress)
        view.evaluation_follows = self._evaluator is not None and due

    def _record(self, epoch: int, outcome: StepOutcome) -> None:
        """Tell the recorder of `dtrain verify` of a step; nobody else wants to know."""
        if self._context.recorder is not None:
            norm = None if outcome.grad_norm is None else float(outcome.grad_norm)
            self._context.recorder.step(
                self._progress.step, epoch, loss=outcome.loss, grad_norm=norm
            )

    def _wishes(self) -> tuple[float, float, float]:
        """What this rank asks of all at the next step boundary: to leave, to save, to end."""
        leave = self._context.stop.reason is not None
        save = self._context.ranks.is_rank_zero and self._schedule.save_overdue()
        return float(leave), float(save), float(self.callbacks.view.ending is not None)

    def _between_steps(self, leave: float, save: float, end: float) -> bool:
        """Do what is due, agreed by all ranks; False to leave."""
        if leave > 0:
            return False
        if end > 0:
            self._progress.stopped_early = True
        if self._schedule.evaluation_due(self._progress) and not self._evaluate():
            return False
        if save > 0 or self._schedule.save_due(self._progress):
            self._save()
            self._schedule.saved()
        return True

    def _save(self) -> bool:
        """Write a checkpoint, once it is proven that what it was trained on is right.

        Returns:
            False where what there is now is no good, and nobody wants to end for that.
        """
        self._data.check()
        if not self._checks.before_save(self._progress.step):
            return False
        self._progress.feed = self._data.state_dict()
        if self._saver.save(self._progress):
            assert self._saver.folder is not None
            self.callbacks.saved(self._saver.folder)
        return True

    def _keep_best(self) -> None:
        if self._save():
            self._saver.keep_best()

    def _evaluate(self) -> bool:
        """Evaluate and judge; False when asked to leave meanwhile (the evaluation is owed then)."""
        if self._evaluator is None:
            return True
        progress = self._progress
        last = self._data.course.over(progress.step, progress.position.epoch)
        predictions = self._predictions() if last else None
        with self._strategy.whole():
            evaluate = functools.partial(self._evaluator, self._evaluated, predictions)
            metrics = self.around_evaluation(evaluate)
        if metrics is None:
            return False
        progress.evaluated_step, progress.metrics = progress.step, metrics
        self._report.evaluated(progress)
        if predictions is not None:
            self._predicted()
        progress.stopped_early = self.callbacks.evaluated(metrics) or progress.stopped_early
        return True

    def _owes_evaluation(self) -> bool:
        """Whether the process before us was asked to leave when an evaluation was due."""
        progress = self._progress
        missed = progress.step > 0 and progress.evaluated_step != progress.step
        return missed and self._schedule.evaluation_due(progress)

    def _evaluate_at_end(self) -> bool:
        """Evaluate and predict, unless that is done; False when asked to leave meanwhile."""
        progress = self._progress
        if progress.evaluated_step != progress.step and not self._evaluate():
            return False
        predictions = self._predictions()
        if predictions is None or progress.predicted_step == progress.step:
            return True
        assert self._evaluator is not None
        with self._strategy.whole():  # stopped early: nobody knew before that it was the last
            if self._evaluator(self._evaluated, predictions, measure=False) is None:
                return False
        self._predicted()
        return True

    @property
    def _evaluated(self) -> torch.nn.Module:
        return self._kept.evaluated(self._parts.model)

    def _predictions(self) -> Predictions | None:
        if self._evaluator is None or not predicts(self._context.task):
            return None
        return Predictions(self._context)

    def _predicted(self) -> None:
        assert self._evaluator is not None
        self._progress.predicted_step = self._progress.step
        self._report.predicted(self._progress, self._evaluator.num_samples)

    def _leave(self) -> TrainResult:
        """Save and go, all ranks together, because one of them was asked to."""
        self._save()
        reasons = collectives.gather_to_all(self._context.stop.reason)
        rank, reason = next((r, why) for r, why in enumerate(reasons) if why is not None)
        self._report.left(self._progress, reason, rank)
        return self._result(stopped=reason)

    def _result(
        self, *, stopped: str | None = None, parameters_sha256: str | None = None
    ) -> TrainResult:
        return TrainResult(
            metrics=self._progress.metrics,
            steps=self._progress.step,
            seconds=time.monotonic() - self._started,
            stopped=stopped,
            stopped_early=self._progress.stopped_early,
            checkpoint=self._saver.folder,
            parameters_sha256=parameters_sha256,
        )


def _just(evaluate: Evaluation) -> dict[str, float] | None:
    return evaluate()
