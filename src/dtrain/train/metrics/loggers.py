"""The loggers that a job can name. Each is a thin layer over its library.

A library is imported when its logger is made. Another package can add a logger: a class with the
same methods, in the entry-point group `dtrain.loggers`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dtrain.environ import shown
from dtrain.job.spec import JobSpec
from dtrain.run.files import write_atomic
from dtrain.run.rundir import RunDir

Outcome = Literal["finished", "stopped", "failed"]
"""How a training ended: complete, stopped on request (it can be resumed), or by an error."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class LoggerContext:
    """The context that a logger receives in addition to the options in the job."""

    run: RunDir
    step: int
    """The number of optimizer steps done. Later steps that were logged are repeated."""
    settings: Mapping[str, str | int | float | bool]
    """The job as a flat mapping: `train.global_batch_size` → 64."""
    own_names: Set[tuple[str, str]] = frozenset()
    """The metrics that a LightningModule has named, as (split, name). It grows in training."""

    def named(self, split: str, values: Values) -> dict[str, float]:
        """Return metrics by names like `train/loss`, or by the name alone if the user chose it."""
        return {
            name if (split, name) in self.own_names else f"{split}/{name}": value
            for name, value in values.items()
        }


class Logger(Protocol):
    """Receives metrics on rank 0. An error that it raises ends the logger, not the training."""

    supports_rewind: bool
    """Whether it removes, when made, the metrics of steps after `LoggerContext.step`.

    A logger that cannot does not receive these steps again, so that its steps never go back."""

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        """Log the metrics of one split (`train` or `eval`) after optimizer step `step`."""

    def close(self, outcome: Outcome) -> None:
        """Send the metrics that are not sent yet."""


def settings_of(spec: JobSpec) -> dict[str, str | int | float | bool]:
    """Return the settings of a training as a flat dict, for the hyperparameters of a tracker.

    Sections `launch` and `log`, which may hold secrets, are left out. Other secrets in the
    values are masked.
    """
    plain = shown("", spec.model_dump(mode="json", exclude={"launch", "log"}, exclude_none=True))
    return dict(_flat(plain, ""))


def _flat(value: Any, above: str) -> Iterator[tuple[str, str | int | float | bool]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{above}.{name}" if above else str(name))
    else:
        plain = isinstance(value, str | int | float | bool)
        yield above, value if plain else json.dumps(value)


class Csv:
    """Writes `train.csv` and `eval.csv` in the run's directory, one column for each metric."""

    supports_rewind = True

    def __init__(self, context: LoggerContext) -> None:
        self._folder = context.run.path
        self._columns: dict[str, list[str]] = {}
        for split in ("train", "eval"):
            rows = [row for row in self._rows(split) if int(row["step"]) <= context.step]
            self._rewrite(split, list(rows[0]) if rows else [], rows)

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        row = {"step": step, "epoch": epoch, **values}
        known = self._columns.get(split, [])
        new = [name for name in row if name not in known]
        if new:
            self._rewrite(split, [*known, *new], list(self._rows(split)))
        with self._path(split).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns[split]).writerow(row)

    def close(self, outcome: Outcome) -> None:
        """Do nothing: `write` closes its file after each row."""

    def _path(self, split: str) -> Path:
        return self._folder / f"{split}.csv"

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of the file. A last line that a kill cut short is skipped."""
        if self._path(split).exists():
            text = self._path(split).read_text(encoding="utf-8")
            yield from csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))

    def _rewrite(self, split: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self._columns[split] = columns
        if columns or self._path(split).exists():
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomic(self._path(split), text.getvalue())


class TensorBoard:
    """Writes event files in `tensorboard/` of the run. Its options are those of `SummaryWriter`."""

    supports_rewind = True

    def __init__(self, context: LoggerContext, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        options.setdefault("log_dir", str(context.run.path / "tensorboard"))
        # without purge_step, a resumed run draws zigzags over the steps that were lost
        self._named = context.named
        self._writer: Any = SummaryWriter(purge_step=context.step + 1, **options)
        if context.step == 0:
            self._writer.add_text("job", _as_text(context.settings))

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        for name, value in self._named(split, values).items():
            self._writer.add_scalar(name, value, step)

    def close(self, outcome: Outcome) -> None:
        self._writer.close()


def _as_text(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"    {name}: {value}" for name, value in settings.items())  # as Markdown


class MLflow:
    """Logs to one MLflow run for all attempts of the run. Later attempts find it by a tag.

    Args:
        context: see `LoggerContext`.
        tracking_uri: a server or a directory. None means MLFLOW_TRACKING_URI if that is set, else
            `mlruns` next to the run directory.
        experiment: the name of the experiment, which is created if it does not exist.
    """

    supports_rewind = False

    def __init__(
        self, context: LoggerContext, tracking_uri: str | None = None, experiment: str = "dtrain"
    ) -> None:
        # a dead server must cost seconds; by default MLflow retries for 4 minutes, each time
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # MLflow 3 needs this variable to accept a directory
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._named = context.named

        folder = context.run.path.parent / "mlruns"
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri()
        self._client: Any = MlflowClient(uri)
        known = self._client.get_experiment_by_name(experiment)
        where = known.experiment_id if known else self._client.create_experiment(experiment)
        self._id = self._resume(where, context.run.id) or self._create(where, context)

    def _resume(self, experiment: str, name: str) -> str | None:
        found = self._client.search_runs([experiment], f"tags.`dtrain.run` = '{name}'")
        if not found:
            return None
        run_id: str = found[0].info.run_id
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _create(self, experiment: str, context: LoggerContext) -> str:
        from mlflow.entities import Param

        name = context.run.id
        made = self._client.create_run(experiment, run_name=name, tags={"dtrain.run": name})
        run_id: str = made.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in context.settings.items()]
        for first in range(0, len(params), 100):  # the largest batch that MLflow accepts
            self._client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {**self._named(split, values), "epoch": epoch}
        metrics = [Metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self._id, status)


class Wandb:
    """Logs to one Weights & Biases run with the run's id. Its options are those of `wandb.init`."""

    supports_rewind = False

    def __init__(self, context: LoggerContext, **options: Any) -> None:
        import wandb

        self._named = context.named

        settings = {"console": "off", "disable_git": True, **options.pop("settings", {})}
        defaults = {
            "id": context.run.id,
            "name": context.run.id,
            "resume": "allow",
            "dir": str(context.run.path),
            "config": dict(context.settings),
        }
        self._run: Any = wandb.init(**{**defaults, **options}, settings=wandb.Settings(**settings))
        self._run.define_metric("*", step_metric="step")

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        self._run.log({"step": step, "epoch": epoch, **self._named(split, values)})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome != "failed" else 1)


_COMET_EXTRAS = (
    "auto_param_logging",
    "auto_metric_logging",
    "auto_output_logging",
    "log_code",
    "log_graph",
    "log_git_metadata",
    "log_git_patch",
    "parse_args",
)
"""Features of Comet that would collect data automatically. Some of them patch torch."""


class Comet:
    """Logs to one Comet experiment of the run. Its options are those of `comet_ml.start`."""

    supports_rewind = False

    def __init__(self, context: LoggerContext, **options: Any) -> None:
        import comet_ml

        self._named = context.named

        quiet: Any = dict.fromkeys(_COMET_EXTRAS, False)
        config = comet_ml.ExperimentConfig(
            name=context.run.id, offline_directory=str(context.run.path / "comet"), **quiet
        )
        key = hashlib.sha256(context.run.id.encode()).hexdigest()[:32]
        defaults = {"experiment_key": key, "mode": "get_or_create", "experiment_config": config}
        self._experiment: Any = comet_ml.start(**{**defaults, **options})
        if context.step == 0:
            self._experiment.log_parameters(dict(context.settings))

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        self._experiment.log_metrics(self._named(split, values), step=step, epoch=epoch)

    def close(self, outcome: Outcome) -> None:
        self._experiment.log_other("outcome", outcome)
        self._experiment.end()
