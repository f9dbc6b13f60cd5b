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
from dtrain.verification.lab import Lab
from dtrain.verification.lengths import epoch_samples as lengths
from dtrain.verification.pairs import (
    ENOUGH,
    REFERENCE,
    Pair,
    all_pairs,
    chosen,
    clusters_here,
    with_more,
)
from dtrain.verification.report import Report


@dataclass(frozen=True)
class Progress:
    row: int
    """The row of the table, from 1 on. It is 0 while the reference runs for the first time."""
    rows: int
    pair: str
    """The row's pair, or the reference."""
    again: str = ""
    """The run that is repeated, and the change in it; empty the first time."""


class Session:
    """A job and the pairs to run it as. As a context manager it removes its runs at the end.

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
        self._lab = Lab(job, overrides=overrides, options=by_launcher, steps=steps, keep=keep)
        if self._lab.spec.data.stream == "sharded":
            raise PlanError(
                "dtrain verify compares with one process, which a stream that shards itself gives "
                "another order than several (data.stream: sharded)",
                code="verify.sharded-stream",
            )
        if watch is not None:
            self._lab.watch = lambda pair, wish: watch(self._progress(pair, wish))
        train = self._lab.spec.train
        self._reference = replace(self._lab.reference, gpus=gpus)
        trainers = self._trainers(trainers)
        if strategies or launchers or nodes or procs or gpus or only:
            self.pairs = chosen(
                trainers=trainers,
                strategies=strategies,
                launchers=launchers,
                nodes=nodes,
                procs=procs,
                gpus=gpus,
                reference=self._reference,
            )
        else:
            self.pairs = all_pairs(trainers, self._reference, clusters_here(os.environ))
        asked_for = set(self.pairs) if only or "exact" in strategies else set()
        self._left_out: dict[Pair, str] = {}
        if not only:
            self.pairs, self._left_out = with_more(self.pairs, train, steps, self._reference)
        self._optional = {pair for pair in self.pairs if _may_be_impossible(pair)} - asked_for
        self._done = 0
        self._lab.wish = replace(self._lab.wish, fp64=deep)
        self._shorten(epoch_samples)
        for pair in self.pairs:
            self._lab.check(pair)
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
        self._lab.__exit__(kind, error, trace)

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
            self._lab.warm_up(self.pairs)
            self._judge = Judge(self._lab, self._reference)
            facts = self._judge.reference.steps[1].facts
            if facts.get("own_steps"):  # the module accumulates gradients itself, or not at all
                self._optional |= {pair for pair in self.pairs if pair.micro_batch_size}
            self._report = Report(
                job=self._lab.spec.name,
                steps=self._lab.steps,
                samples=facts.get("num_samples"),
                reference=self._reference.name,
                recording=self._judge.reference,
                deep=self._lab.wish.fp64,
                left_out={pair.name: why for pair, why in self._left_out.items()},
            )

    def results(self) -> Iterator[Result]:
        """Run the pairs, and yield the result of each as soon as it is available."""
        self.begin()
        assert self._judge is not None
        for result in self._judge.judge(self.pairs):
            self._done += 1
            if result.verdict == "failed" and result.pair in self._optional:
                self.report.left_out[result.pair.name] = result.reason
                continue
            self.report.results.append(result)
            yield result

    def _progress(self, pair: Pair, wish: TraceOptions) -> Progress:
        rows = len(self.pairs)
        if self._judge is None:
            return Progress(0, rows, pair.name)
        again = wish.beyond(self._lab.wish)
        if pair == self._reference:
            again = f"the reference {again}"
        return Progress(self._done + 1, rows, self.pairs[self._done].name, again)

    def _trainers(self, asked: Sequence[str]) -> Sequence[str]:
        """Return the requested trainers; for a LightningModule, the only one that can train it."""
        only = self._reference.trainer
        if only == REFERENCE.trainer:
            return asked
        for trainer in asked:
            if trainer != only:
                raise PlanError(
                    f"{self._lab.spec.task} is a LightningModule, which trainer {trainer!r} cannot "
                    f"train: it is compared with one process of trainer {only!r}",
                    code="verify.trainer-unsuitable",
                )
        return (only,)

    def _shorten(self, epoch_samples: int | str) -> None:
        """Shorten the epochs of the runs, unless all samples are requested."""
        if epoch_samples == "all":
            return
        train, evaluated = lengths(self._lab.spec, [self._reference, *self.pairs])
        self._lab.wish = replace(
            self._lab.wish,
            max_train_samples=train if isinstance(epoch_samples, str) else epoch_samples,
            max_eval_samples=evaluated,
        )


def _may_be_impossible(pair: Pair) -> bool:
    """Return whether some jobs that train cannot be trained with this pair.

    Examples are sparse gradients, and a norm over one sample.
    """
    return pair.is_exact or (pair.micro_batch_size or ENOUGH) < ENOUGH
