"""One `dtrain verify`, from the request to the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from dtrain.errors import PlanError
from dtrain.trace import TraceOptions
from dtrain.verification.judge import Judge, Result
from dtrain.verification.layouts import (
    MIN_FORWARD_SAMPLES,
    REFERENCE,
    Layout,
    all_layouts,
    compiled_layouts,
    reachable_clusters,
    requested_layouts,
    with_extra_layouts,
)
from dtrain.verification.lengths import epoch_samples as lengths
from dtrain.verification.report import Report
from dtrain.verification.runner import Runner


@dataclass(frozen=True)
class Progress:
    row: int
    """The row of the table, from 1 on. It is 0 while the reference runs for the first time."""
    rows: int
    layout: str
    """The row's layout, or the reference."""
    again: str = ""
    """The run that is repeated, and the change in it; empty the first time."""


class Session:
    """A job and the layouts to run it as. As a context manager it removes its runs at the end.

    Args:
        job: path of job.yaml.
        steps: optimizer steps of each run.
        strategies, trainers, launchers, nodes, procs: what to run. If all are empty, everything
            that this machine can run. Micro-batches, a resume and `exact` are added.
        only: run nothing except what these name.
        gpus: give each process a GPU.
        deep: run everything in fp64, where no difference counts as rounding.
        epoch_samples: train on the first so many samples. `auto` takes so few that five steps see
            a short last batch, unequal shares and a second epoch. `all` takes all of them.
        overrides: settings of the job, as `--set` takes them.
        options: `NAME=VALUE` options of the named launchers.
        keep: where run directories are kept. None means that they are removed.
        watch: called at intervals while something runs.

    Raises:
        JobError, PlanError: the job is wrong, or cannot be run in any of the requested ways.
    """

    def __init__(
        self,
        job: str | Path,
        *,
        steps: int = 5,
        strategies: Sequence[str] = (),
        trainers: Sequence[str] = (),
        launchers: Sequence[str] = (),
        nodes: Sequence[int] = (),
        procs: Sequence[int] = (),
        only: bool = False,
        gpus: bool = False,
        deep: bool = False,
        epoch_samples: int | str = "auto",
        overrides: Sequence[str] = (),
        options: Sequence[str] = (),
        keep: str | Path | None = None,
        watch: Callable[[Progress], None] | None = None,
    ) -> None:
        by_launcher = dict.fromkeys(launchers or ["local"], options)
        self._runner = Runner(job, overrides=overrides, options=by_launcher, steps=steps, keep=keep)
        if self._runner.spec.data.stream == "sharded":
            raise PlanError(
                "dtrain verify compares with one process, but a stream that shards itself gives "
                "one process another order than several (data.stream: sharded)",
                code="verify.sharded-stream",
            )
        if watch is not None:
            self._runner.watch = lambda layout, trace_options: watch(
                self._progress(layout, trace_options)
            )
        train = self._runner.spec.train
        self._reference = replace(self._runner.reference, gpus=gpus)
        trainers = self._trainers(trainers)
        if strategies or launchers or nodes or procs or gpus or only:
            self.layouts = requested_layouts(
                trainers=trainers,
                strategies=strategies,
                launchers=launchers,
                nodes=nodes,
                procs=procs,
                gpus=gpus,
                reference=self._reference,
            )
        else:
            self.layouts = all_layouts(trainers, self._reference, reachable_clusters(os.environ))
        requested = set(self.layouts) if only or "exact" in strategies else set()
        self._left_out: dict[Layout, str] = {}
        if not only:
            self.layouts, self._left_out = with_extra_layouts(
                self.layouts, train, steps, self._reference
            )
        if train.compile:
            self.layouts = compiled_layouts(self.layouts, self._reference)
        self._optional = {
            layout for layout in self.layouts if _may_be_impossible(layout)
        } - requested
        self._done = 0
        self._runner.trace_options = replace(self._runner.trace_options, fp64=deep)
        self._shorten(epoch_samples)
        for layout in self.layouts:
            self._runner.check(layout)
        self._judge: Judge | None = None
        self._report: Report | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.__exit__(kind, error, trace)

    @property
    def report(self) -> Report:
        """The findings so far; only after `begin`."""
        assert self._report is not None
        return self._report

    def begin(self) -> None:
        """Run the reference.

        Raises:
            RunFailed: the job fails even as one process.
        """
        if self._judge is None:
            self._runner.warm_up(self.layouts)
            self._judge = Judge(self._runner, self._reference)
            facts = self._judge.reference.steps[1].facts
            if facts.get("own_steps"):  # the module accumulates gradients itself, or not at all
                self._optional |= {layout for layout in self.layouts if layout.micro_batch_size}
            self._report = Report(
                job=self._runner.spec.name,
                steps=self._runner.steps,
                samples=facts.get("num_samples"),
                reference=self._reference.name,
                recording=self._judge.reference,
                deep=self._runner.trace_options.fp64,
                left_out={layout.name: why for layout, why in self._left_out.items()},
            )

    def results(self) -> Iterator[Result]:
        """Run the layouts, and yield the result of each as soon as it is available."""
        self.begin()
        assert self._judge is not None
        for result in self._judge.judge(self.layouts):
            self._done += 1
            if result.verdict == "failed" and result.layout in self._optional:
                self.report.left_out[result.layout.name] = result.reason
                continue
            self.report.results.append(result)
            yield result

    def _progress(self, layout: Layout, trace_options: TraceOptions) -> Progress:
        rows = len(self.layouts)
        if self._judge is None:
            return Progress(0, rows, layout.name)
        again = trace_options.beyond(self._runner.trace_options)
        if layout == self._reference:
            again = f"the reference {again}"
        return Progress(self._done + 1, rows, self.layouts[self._done].name, again)

    def _trainers(self, requested: Sequence[str]) -> Sequence[str]:
        """Return the requested trainers; for a LightningModule, the only one that can train it."""
        only = self._reference.trainer
        if only == REFERENCE.trainer:
            return requested
        for trainer in requested:
            if trainer != only:
                raise PlanError(
                    f"{self._runner.spec.task} is a LightningModule, which trainer {trainer!r} "
                    f"cannot train: it is compared with one process of trainer {only!r}",
                    code="verify.trainer-unsuitable",
                )
        return (only,)

    def _shorten(self, epoch_samples: int | str) -> None:
        """Shorten the epochs of the runs, unless all samples are requested."""
        if epoch_samples == "all":
            return
        train, evaluated = lengths(self._runner.spec, [self._reference, *self.layouts])
        self._runner.trace_options = replace(
            self._runner.trace_options,
            max_train_samples=train if isinstance(epoch_samples, str) else epoch_samples,
            max_eval_samples=evaluated,
        )


def _may_be_impossible(layout: Layout) -> bool:
    """Return whether some jobs that train cannot be trained with this layout.

    Examples are sparse gradients, and a norm over one sample.
    """
    return layout.is_exact or (layout.micro_batch_size or MIN_FORWARD_SAMPLES) < MIN_FORWARD_SAMPLES
