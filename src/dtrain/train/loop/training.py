"""One training in one process, which a loop drives step by step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from dtrain import catalog
from dtrain.train import collectives
from dtrain.train.checkpoint.state import parameters_sha256
from dtrain.train.checks import initial_state
from dtrain.train.checks.checks import Checks
from dtrain.train.checks.train_state import TrainState
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.data.pipeline import Step
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.faults import Injector
from dtrain.train.loop import build
from dtrain.train.loop.added_groups import watch_groups
from dtrain.train.loop.callbacks import Callbacks, View
from dtrain.train.loop.checkpointing import Saver
from dtrain.train.loop.metric_callbacks import Keep
from dtrain.train.loop.predictions import Predictions, predicts
from dtrain.train.loop.progress import Progress, Schedule, refuse_to_end_before
from dtrain.train.loop.reporting import Report
from dtrain.train.loop.step import StepFlags, StepOutcome, TrainStep
from dtrain.train.loop.task_state import Kept
from dtrain.train.metrics.events import Events
from dtrain.train.metrics.phases import PhaseClock
from dtrain.train.strategies.base import Strategy
from dtrain.train.weights.initial import InitialWeights

Metrics = dict[str, float]
EvaluationWrapper = Callable[[Callable[[], Metrics | None]], Metrics | None]
"""Calls an evaluation, for a trainer that does more before and after it."""


class Training:
    """One training in one process, from set-up to result."""

    def __init__(
        self,
        context: TrainContext,
        injector: Injector,
        kept: Kept,
        evaluation_wrapper: EvaluationWrapper,
    ) -> None:
        self._started = time.monotonic()
        self.logged: Callable[[], Metrics] = dict
        """Returns what a LightningModule logged in the last step; all ranks call it."""
        self._of_epoch: Callable[[], Metrics] = getattr(context.task, "training_metrics", dict)
        """Returns what a library's task has computed of the epoch so far; all ranks call it."""
        self._context = context
        self._injector = injector
        self._kept = kept
        self._evaluation_wrapper = evaluation_wrapper
        self._events = Events(context.run, context.ranks, context.attempt)
        self._build()
        resumed = self._restore()
        self._wrap()
        self._arm()
        self._initial.tell(self._events)
        data = self._data_identity
        self._report.started(self.progress, self.course, resumed=resumed, data=data)

    def _build(self) -> None:
        """Make the parts, the data and the callbacks from the task, the same on every rank."""
        context = self._context
        initial_state.compare_surroundings(context.task, context.spec.seed)
        self._strategy: Strategy = catalog.load("strategy", context.spec.strategy)(context)
        self._initial = InitialWeights(context)
        self.parts = build.build_parts(context, self._strategy, self._initial)
        self.data = build.train_feed(context)
        self.data.meets = self._strategy.meets_in_forward
        self.course = self.data.course
        self._evaluator = build.make_evaluators(context)
        self._schedule = Schedule(context.spec)
        self._report = Report(context, self._events)
        self._phases = PhaseClock.of(context)
        self.keep_names = self._report.keep_names
        view = View(context, self.parts.model, self.parts.optimizer, self._report.note, self._keep)
        self.callbacks = Callbacks(context, view, evaluates=self._evaluator is not None)
        self._kept.begin(self.parts.model, self.callbacks.each)

    def _restore(self) -> bool:
        """Resume from the newest checkpoint. Return whether there is one.

        This comes before wrapping: wrappers copy weights, and register the parameters that are
        not frozen.
        """
        identity = self._data_identity = build.feed_identity(self.data)
        self._saver = Saver(
            self._context, self.parts, self.callbacks, self._kept, identity, self._events
        )
        resumed = self._saver.resume()
        self.progress = resumed or Progress()
        total = self.course.total_steps
        refuse_to_end_before(self.progress.step, total)
        build.warn_about_parts(self.parts, total, self._context, self._events)
        self.data.load_state_dict(self.progress.feed)
        return resumed is not None

    def _wrap(self) -> None:
        """Wrap the loss for the strategy. From here on, no foreign parameter may be added."""
        self._strategy.prepare(self.parts.loss)
        watch_groups(self.parts.optimizer, self.parts.model)

    def _arm(self) -> None:
        """Prepare the first step.

        Faults come before checks: the optimizer hook of the checks must see what the hook of a
        fault has changed. Random numbers come last: nothing above may change what the first step
        draws.
        """
        context, parts, injector = self._context, self.parts, self._injector
        self._state = state = TrainState(
            parts.model,
            (parts.optimizer,),
            () if parts.scheduler is None else (parts.scheduler,),
            parts.scaler,
            lambda: self.progress.counters(),
            self._kept.leaves,
        )
        injector.begin(context.task, state, self.course.total_steps)
        self._checks = Checks(
            context, state, parts.loss, self.data, self._events, injector.between_steps
        )
        self._checks.begin(self.progress.step)
        self._step = TrainStep(
            parts,
            self._strategy,
            context.spec.train,
            context.device,
            self._checks.finite,
            self._phases,
        )
        self._saver.begin_random(self.progress)
        self._asked = StepFlags(*[0.0] * 6)
        """The flags of the last step, summed over all ranks."""

    def begin(self) -> bool:
        """Run the evaluation that an interrupted process skipped. Return False to stop."""
        self._phases.begin(self.progress.step)
        self._update_session()
        self.callbacks.start(self.progress)
        self._saver.small_states()  # raises now rather than at the first save
        return not self._missed_evaluation() or self._evaluate()

    def end(self, *, complete: bool) -> TrainResult:
        """Evaluate and save after the last step, or save and stop when asked to stop."""
        self._report.last_step()
        if not (complete and self._evaluate_at_end()):
            return self._stop()
        self._injector.end(self._state, self.progress.step)
        self._save(wait=True)
        self.callbacks.end()
        result = self._result(parameters_sha256=parameters_sha256(self.parts.model))
        self._report.finished(result)
        return result

    def close(self) -> None:
        """Release everything that holds processes, files or the wrapped model."""
        self._saver.close()
        self._strategy.close()
        self.data.close()
        self._phases.close()
        self._report.close()
        if self._evaluator is not None:
            self._evaluator.close()

    def steps(self, *, hooks: bool = False) -> Generator[Step, None, None]:
        """Yield each remaining global batch, with this rank's micro-batches and their number.

        The caller passes each to `step` before it takes the next. `hooks` means that a library's
        hooks are called between two steps.
        """
        recorder, progress = self._context.recorder, self.progress
        if recorder is not None:
            self.data.note_contents()
            self.data.watchers.append(lambda each: recorder.read(each.samples, each.contents))
        split = self._strategy.micro_batches
        watch = self._injector.requests(self.data, progress.step, progress.position, split)
        batches = self.data.batches(progress.step, progress.position, split, watch)
        while not progress.stopped_early:  # a batch that is taken is trained on
            self._phases.enter("data")
            step = next(batches, None)
            self._phases.enter("other")
            if step is None:
                return
            yield step
            if not hooks:
                self._checks.between_steps()

    def step(
        self, batch: GlobalBatch, micro_batches: Iterator[tuple[int, Any]], num_micro_batches: int
    ) -> bool:
        """Do one optimizer step and what is due after it. Return False to stop."""
        self.update(batch, micro_batches, num_micro_batches)
        return self.evaluate_if_due() and self.save_if_due()

    def update(
        self, batch: GlobalBatch, micro_batches: Iterator[tuple[int, Any]], num_micro_batches: int
    ) -> None:
        """Do one optimizer step. The caller then calls `evaluate_if_due` and `save_if_due`."""
        context, progress = self._context, self.progress
        lr = float(self.parts.optimizer.param_groups[0]["lr"])
        self._strategy.start_step(batch)
        self._checks.step_begins(batch.step + 1, batch.epoch, idle=num_micro_batches == 0)
        flags = self._flags(batch)
        self._phases.enter("data")
        outcome = self._step(micro_batches, num_micro_batches, batch.size, flags)
        if not outcome.skipped:
            self._kept.update()
        self.data.agree(batch, outcome.flags.position)
        progress.step += 1
        progress.position = batch.after
        flags = outcome.flags
        self._phases.enter("checkpoint")
        self._saver.proceed(busy=flags.writing > 0, failed=flags.write_failed > 0)
        self._phases.enter("other")
        self._saver.prepare(self.parts.model, [self.parts.optimizer])
        self._record(batch.epoch, outcome)
        if outcome.skipped:
            self._events.write("step_skipped", step=progress.step, loss=outcome.loss)
        if progress.step == 1 and context.spec.train.compile:
            build.warn_of_nothing_compiled(context, self._events)
        if batch.ends_epoch:
            self.data.check()
            self._report.epoch_read(batch, self.data.samples_read())
        self._checks.step_ended(progress.step, ends_epoch=batch.ends_epoch)
        self._update_session(batch.size)
        ends = self.callbacks.step(outcome.loss, ends_epoch=batch.ends_epoch)
        metrics = functools.partial(self._metrics_of, outcome, lr)
        compiled = flags.compiled > 0
        self._report.step(progress.step, batch.epoch, batch.size, metrics, compiled=compiled)
        if batch.ends_epoch:
            self._report.epoch_ended(progress, self._of_epoch())
        self._asked = outcome.flags._replace(end=float(outcome.flags.end or ends))
        self._phases.step_done(progress.step)

    def _metrics_of(self, outcome: StepOutcome, lr: float) -> Metrics:
        """Return the values of the line of metrics after a step. All ranks call it."""
        logged, metrics = self.logged(), outcome.metrics(lr)
        self.keep_names("train", logged.keys() - metrics.keys())
        return {**self._of_epoch(), **logged, **metrics}

    def epoch_ended(self, metrics: Metrics) -> None:
        """Write the metrics that were logged for the epoch that has just ended."""
        self.keep_names("train", metrics)
        self._report.epoch_ended(self.progress, metrics)

    def _update_session(self, batch_size: int = 0) -> None:
        """Update the session that callbacks see: what follows the step that was just done."""
        view, progress = self.callbacks.view, self.progress
        view.batch_size = batch_size
        view.over = progress.stopped_early or self.course.over(
            progress.step, progress.position.epoch
        )
        due = view.over or self._schedule.evaluation_due(progress)
        view.evaluation_follows = self._evaluator is not None and due

    def _record(self, epoch: int, outcome: StepOutcome) -> None:
        """Pass a step to the recorder of `dtrain verify`, if there is one."""
        if self._context.recorder is not None:
            norm = None if outcome.grad_norm is None else float(outcome.grad_norm)
            self._context.recorder.step(
                self.progress.step, epoch, loss=outcome.loss, grad_norm=norm
            )

    def _flags(self, batch: GlobalBatch) -> StepFlags:
        """Return this rank's requests for the next step boundary, and its position."""
        writing, failed = self._saver.state()
        return StepFlags(
            stop=self._context.stop.reason is not None,
            save=self._context.ranks.is_rank_zero and self._saver.overdue,
            end=self.callbacks.view.ending is not None,
            writing=writing,
            write_failed=failed,
            position=batch.fingerprint,
        )

    def evaluate_if_due(self) -> bool:
        """Evaluate after a step if all ranks agreed to. Return False to stop."""
        if self._asked.stop:
            return False
        if self._asked.end:
            self.progress.stopped_early = True
        return not self._schedule.evaluation_due(self.progress) or self._evaluate()

    def save_if_due(self) -> bool:
        """Save after a step if all ranks agreed to. Return True."""
        if self._asked.save or self._schedule.save_due(self.progress):
            self._save(wait=self.callbacks.view.over)
        return True

    def _save(self, *, wait: bool = False, urgent: bool = False) -> bool:
        """Save a checkpoint after checking the data and the state that it is made of.

        Args:
            wait: whether to return when it is on disk.
            urgent: whether to save even if another save is in progress.

        Returns:
            False if a check found an error and the job does not ask to end training for it.
        """
        with self._phases.within("checkpoint"):
            if wait:
                self._saver.finish()
            self.data.check()
            if not self._checks.before_save(self.progress.step):
                return False
            self.progress.feed = self.data.state_dict()
            self._saver.save(self.progress, wait=wait, urgent=wait or urgent)
        return True

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        self._saver.finish()

    def _keep(self, asked: Keep) -> None:
        if self._save(urgent=True):
            self._saver.keep(self.progress.step, asked)

    def _evaluate(self) -> bool:
        """Evaluate, and let callbacks decide whether training ends.

        Returns:
            False when a rank was asked to stop meanwhile; a resume then repeats the evaluation.
        """
        if self._evaluator is None:
            return True
        progress = self.progress
        last = self.course.over(progress.step, progress.position.epoch)
        predictions = self._predictions() if last else None
        with self._phases.within("evaluation"), self._strategy.whole():
            evaluate = functools.partial(self._evaluator, self._evaluated, predictions)
            metrics = self._evaluation_wrapper(evaluate)
        if metrics is None:
            return False
        progress.evaluated_step, progress.metrics = progress.step, metrics
        self._report.evaluated(progress)
        if predictions is not None:
            self._predicted()
        progress.stopped_early = self.callbacks.evaluated(metrics) or progress.stopped_early
        return True

    def _missed_evaluation(self) -> bool:
        """Return whether the previous process was asked to stop when an evaluation was due."""
        progress = self.progress
        missed = progress.step > 0 and progress.evaluated_step != progress.step
        return missed and self._schedule.evaluation_due(progress)

    def _evaluate_at_end(self) -> bool:
        """Evaluate and predict, unless that is done. Return False when asked to stop meanwhile."""
        progress = self.progress
        if progress.evaluated_step != progress.step and not self._evaluate():
            return False
        predictions = self._predictions()
        if predictions is None or progress.predicted_step == progress.step:
            return True
        assert self._evaluator is not None
        # after an early stop: the last step was not known before
        with self._phases.within("evaluation"), self._strategy.whole():
            if self._evaluator(self._evaluated, predictions, measure=False) is None:
                return False
        self._predicted()
        return True

    @property
    def _evaluated(self) -> torch.nn.Module:
        return self._kept.evaluated(self.parts.model)

    def _predictions(self) -> Predictions | None:
        if self._evaluator is None or not predicts(self._context.task):
            return None
        return Predictions(self._context)

    def _predicted(self) -> None:
        assert self._evaluator is not None
        self.progress.predicted_step = self.progress.step
        self._report.predicted(self.progress, self._evaluator.num_samples)

    def _stop(self) -> TrainResult:
        """Save and stop on all ranks together, because one of them was asked to stop."""
        self._saver.stopping(self.progress.step)
        self._save(wait=True)
        reasons = collectives.gather_to_all(self._context.stop.reason)
        rank, reason = next((r, why) for r, why in enumerate(reasons) if why is not None)
        self._report.left(self.progress, reason, rank)
        return self._result(stopped=reason)

    def _result(
        self, *, stopped: str | None = None, parameters_sha256: str | None = None
    ) -> TrainResult:
        return TrainResult(
            metrics=self.progress.metrics,
            steps=self.progress.step,
            seconds=time.monotonic() - self._started,
            stopped=stopped,
            stopped_early=self.progress.stopped_early,
            checkpoint=self._saver.folder,
            parameters_sha256=parameters_sha256,
        )
