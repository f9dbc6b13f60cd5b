"""One `dtrain verify`, from what was asked for to the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from dtrain.errors import PlanError
from dtrain.verify.judge import Judge, Result
from dtrain.verify.lab import Lab
from dtrain.verify.pairs import REFERENCE, Pair, all_pairs, chosen, clusters_here
from dtrain.verify.report import Report


class Session:
    """A job and the pairs to run it as. A context manager: it leaves no runs behind.

    Args:
        job: path of job.yaml.
        steps: optimizer steps of each run.
        strategies, trainers, launchers, nodes, procs: what to run; where all are empty,
            everything that this machine can.
        gpus: give each process a GPU.
        epoch_samples: train on the first so many samples; `auto`: so few that five steps see a
            short last batch, unequal shares and a second epoch; `all`.
        overrides: settings of the job, as `--set` takes them.
        keep: where run directories stay; None: nowhere.
        pairs: exactly these, instead of what the above would give.

    Raises:
        JobError, PlanError: the job is wrong, or cannot be run in any of the ways asked for.
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
        gpus: bool = False,
        epoch_samples: int | str = "auto",
        overrides: Sequence[str] = (),
        keep: str | Path | None = None,
        pairs: Sequence[Pair] | None = None,
    ) -> None:
        self._lab = Lab(job, overrides=overrides, steps=steps, keep=keep)
        batch = self._lab.spec.train.global_batch_size
        self._reference = replace(self._lab.reference, gpus=gpus)
        trainers = self._trainers(trainers)
        if pairs is not None:
            self.pairs = list(pairs)
        elif strategies or launchers or nodes or procs or gpus:
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
            clusters = clusters_here(os.environ)
            self.pairs = all_pairs(batch, steps, trainers, self._reference, clusters)
        self._shorten(batch, epoch_samples)
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
        """What was found so far; only after `begin`."""
        assert self._report is not None
        return self._report

    def begin(self) -> None:
        """Run the reference.

        Raises:
            RunFailed: the job does not even run as one process.
        """
        if self._judge is None:
            self._judge = Judge(self._lab, self._reference)
            self._report = Report(
                job=self._lab.spec.name,
                steps=self._lab.steps,
                samples=self._judge.reference.steps[1].facts.get("num_samples"),
                reference=self._reference.name,
                recording=self._judge.reference,
            )

    def results(self) -> Iterator[Result]:
        """Run the pairs; the result of each as soon as there is one."""
        self.begin()
        assert self._judge is not None
        for result in self._judge.judge(self.pairs):
            self.report.results.append(result)
            yield result

    def _trainers(self, asked: Sequence[str]) -> Sequence[str]:
        """Those asked for; of a LightningModule, the only one that can train it."""
        only = self._reference.trainer
        if only == REFERENCE.trainer:
            return asked
        for trainer in asked:
            if trainer != only:
                raise PlanError(
                    f"{self._lab.spec.task} is a LightningModule, which trainer {trainer!r} cannot "
                    f"train: it is compared with one process of trainer {only!r}"
                )
        return (only,)

    def _shorten(self, batch: int, epoch_samples: int | str) -> None:
        """Let the runs' epochs end early: two full batches and a short one for all processes."""
        if epoch_samples == "all":
            return
        most = max(pair.parts for pair in self.pairs)
        rest = min(2 * most + 1, max(1, batch - 1))  # so that shares are unequal and none is empty
        samples = 2 * batch + rest if isinstance(epoch_samples, str) else epoch_samples
        self._lab.wish = replace(
            self._lab.wish, max_train_samples=samples, max_eval_samples=batch + rest
        )
