"""The loggers that a job can name, each a thin layer over its library, imported when made.

One from outside is a class like these, under the entry-point group `dtrain.loggers`.
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
"""How a training ended: complete, asked to leave (it can be resumed), or neither."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class LoggerContext:
    """What a logger is made with, besides the options in the job."""

    run: RunDir
    step: int
    """Optimizer steps done; what was logged of later ones is lost and comes again."""
    settings: Mapping[str, str | int | float | bool]
    """The job, flat: `train.global_batch_size` → 64."""
    own_names: Set[tuple[str, str]] = frozenset()
    """Metrics that a LightningModule has named, as (split, name); grows while training."""

    def named(self, split: str, values: Values) -> dict[str, float]:
        """Metrics by `train/loss`; by the name alone where that is a user's own."""
        return {
            name if (split, name) in self.own_names else f"{split}/{name}": value
            for name, value in values.items()
        }


class Logger(Protocol):
    """Takes metrics on rank 0. What it raises ends the logger, not the training."""

    supports_rewind: bool
    """Whether it forgets, when made, what it was given of steps after `LoggerContext.step`. One
    that cannot is not given these steps again, so that its steps never go back."""

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        """Take the metrics of one split (`train` or `eval`) after optimizer step `step`."""

    def close(self, outcome: Outcome) -> None:
        """Send what is left."""


def settings_of(spec: JobSpec) -> dict[str, str | int | float | bool]:
    """What decides a training, flat, for the hyperparameters of a tracker.

    Without `launch` and `log`, which may hold secrets, and what else looks like one.
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
    """`train.csv` and `eval.csv` in the run's folder, one column for each metric."""

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
        """See `Logger`."""

    def _path(self, split: str) -> Path:
        return self._folder / f"{split}.csv"

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        """What is there; a last line cut short by a kill is passed over."""
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
    """Event files in `tensorboard/` of the run; options are those of `SummaryWriter`."""

    supports_rewind = True

    def __init__(self, context: LoggerContext, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        options.setdefault("log_dir", str(context.run.path / "tensorboard"))
        # purge_step: without it a resumed run draws zigzags over the steps that were lost
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
    """One MLflow run for the whole run, found again by a tag.

    Args:
        context: see there.
        tracking_uri: a server or a folder; else MLFLOW_TRACKING_URI, else `mlruns` beside the run.
        experiment: its name; made when it is not there.
    """

    supports_rewind = False

    def __init__(
        self, context: LoggerContext, tracking_uri: str | None = None, experiment: str = "dtrain"
    ) -> None:
        # a dead server must cost seconds; on its own MLflow tries for 4 minutes, each time
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # MLflow 3 wants to be told that a folder will do
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
        for first in range(0, len(params), 100):  # as many as it takes at once
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
    """One Weights & Biases run of the run's id; options are those of `wandb.init`."""

    supports_rewind = False

    def __init__(self, context: LoggerContext, **options: Any) -> None:
        import wandb

        self._named = context.named

        settings = {"console": "off", "disable_git": True, **options.pop("settings", {})}
        ours = {
            "id": context.run.id,
            "name": context.run.id,
            "resume": "allow",
            "dir": str(context.run.path),
            "config": dict(context.settings),
        }
        self._run: Any = wandb.init(**{**ours, **options}, settings=wandb.Settings(**settings))
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
"""What Comet would gather on its own: it patches torch for some of it."""


class Comet:
    """One Comet experiment of the run's key; options are those of `comet_ml.start`."""

    supports_rewind = False

    def __init__(self, context: LoggerContext, **options: Any) -> None:
        import comet_ml

        self._named = context.named

        quiet: Any = dict.fromkeys(_COMET_EXTRAS, False)
        config = comet_ml.ExperimentConfig(
            name=context.run.id, offline_directory=str(context.run.path / "comet"), **quiet
        )
        key = hashlib.sha256(context.run.id.encode()).hexdigest()[:32]
        ours = {"experiment_key": key, "mode": "get_or_create", "experiment_config": config}
        self._experiment: Any = comet_ml.start(**{**ours, **options})
        if context.step == 0:
            self._experiment.log_parameters(dict(context.settings))

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        self._experiment.log_metrics(self._named(split, values), step=step, epoch=epoch)

    def close(self, outcome: Outcome) -> None:
        self._experiment.log_other("outcome", outcome)
        self._experiment.end()
