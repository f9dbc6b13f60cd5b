"""Writes metrics.jsonl, and passes the metrics to the job's loggers; rank 0 alone does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from dtrain import catalog
from dtrain.job.fields import LoggerEntry, split_entry
from dtrain.job.spec import JobSpec
from dtrain.run.files import append_line, read_lines
from dtrain.run.rundir import RunDir
from dtrain.train.metrics.loggers import Logger, LoggerContext, Outcome, settings_of
from dtrain.train.seeding import RandomState

logger = logging.getLogger(__name__)


class Metrics:
    """Appends metrics as JSON lines: time, step, epoch, split and the values.

    A logger that fails, when it is made or later, is not used from then on, with one warning.
    Training continues. No logger changes the random numbers of the training.
    """

    def __init__(self, run: RunDir, spec: JobSpec, *, active: bool) -> None:
        self._run = run
        self._spec = spec
        self._active = active
        self._loggers: list[tuple[str, Logger]] = []
        self.own_names: set[tuple[str, str]] = set()
        """The metrics that a user has named, as (split, name)."""
        self._logged: dict[str, int] = {}
        """The last step of each split that an earlier process has written."""
        self.outcome: Outcome = "failed"
        """How training ended; the caller sets it before `close`."""

    def begin(self, step: int) -> None:
        """Make the loggers. `step` is the number of steps done before the first line."""
        if not (self._active and self._spec.log.loggers):
            return
        for line in read_lines(self._run.metrics, split=str, step=int):
            self._logged[line["split"]] = max(line["step"], self._logged.get(line["split"], 0))
        context = LoggerContext(self._run, step, settings_of(self._spec), self.own_names)
        for entry in self._spec.log.loggers:
            self._open(entry, context)

    def write(self, split: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line.

        Args:
            split: `train` or `eval`; with `lightning.also_run` also `validate` or `test`.
            step: the number of optimizer steps done.
            epoch: the epoch of that step, counted from 0.
            values: the metrics by name. Split train has loss, lr, samples_per_second and, with
                clipping, grad_norm. A value with the name of a field that every line has, for
                example `step`, is left out.
        """
        if not self._active:
            return
        fields = {"time": time.time(), "step": step, "epoch": epoch, "split": split}
        values = {name: value for name, value in values.items() if name not in fields}
        append_line(self._run.metrics, {**fields, **values})
        again = step <= self._logged.get(split, -1)
        for named in list(self._loggers):
            name, each = named
            accepts = each.supports_rewind or not again
            if accepts and not _works(name, partial(each.write, split, step, epoch, values)):
                self._loggers.remove(named)

    def close(self) -> None:
        """Close the loggers with the outcome of the training."""
        for name, each in self._loggers:
            _works(name, partial(each.close, self.outcome))
        self._loggers.clear()

    def _open(self, entry: LoggerEntry, context: LoggerContext) -> None:
        name, options = split_entry(entry)

        def make() -> None:
            problem = catalog.problem_of("logger", name)
            if problem is not None:
                raise ImportError(problem)
            self._loggers.append((name, catalog.load("logger", name)(context, **options)))

        _works(name, make)


def _works(name: str, action: Callable[[], Any]) -> bool:
    """Call a logger and return whether it succeeded.

    Its errors become a warning, and the random number generators are restored.
    """
    before = RandomState.capture()
    try:
        action()
    except Exception as error:  # no error of a logger may end the training
        what = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("logger %s failed and is not used any more: %s", name, what)
        return False
    finally:
        before.restore()
    return True
