"""What differs between runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dtrain.comparing import code, losses
from dtrain.comparing.losses import Parting
from dtrain.run import files
from dtrain.run.rundir import RunDir
from dtrain.searching import index
from dtrain.searching.index import SPLITS

Values = dict[str, list[Any]]
"""By name, the value of each run. None if a run has none."""

_ABOUT = ("id", "state", "step", "total_steps", "started", "duration", "path", "url")
_PLACEMENT = (
    "name", "strategy", "launch.", "log.", "data.workers", "data.prefetch", "data.pin_memory",
    "data.exactly_once", "train.micro_batch_size", "train.activation_checkpointing",
    "train.compile", "fsdp.wrap", "fsdp.reshard", "fsdp.cpu_offload", "fsdp.replicas",
    "checks.every_steps", "checkpoint.every", "checkpoint.mtbf", "checkpoint.keep",
    "checkpoint.best", "checkpoint.staging", "checkpoint.busy", "checkpoint.on_error", "profile",
)  # fmt: skip
"""Beginnings of the fields that do not change the training, except for rounding."""
_OF_PLAN = (
    "launcher",
    "profile",
    "world_size",
    "replicas",
    "device",
    "backend",
    "threads_per_proc",
)
_SPEEDS = ("samples_per_second",)
"""Metrics that are not of the training."""


@dataclass(frozen=True)
class Comparison:
    """What differs between runs. Names with the same value in all of them are left out."""

    runs: list[dict[str, Any]]
    """The id, the state and the progress of each run."""
    job: Values
    """Fields of the job that change the training."""
    launch: Values
    """Fields of the job and of the plan that do not, except for rounding."""
    code: Values
    """The commit, and the files that differ from it."""
    environment: Values
    """Hosts, devices, versions of packages, and environment variables."""
    data: Values
    """The number of samples and the fingerprint of the training data."""
    metrics: Values
    """The newest value of each metric."""
    losses: list[Parting]
    """For each run after the first one: where its training losses part from the first one's."""
    unknown: list[str] = field(default_factory=list)
    """The parts of which some run has no record, so that they may differ."""
    notes: list[str] = field(default_factory=list)
    """More about what is not known."""

    @property
    def sections(self) -> dict[str, Values]:
        """Return the parts that are compared name by name."""
        names = ("job", "launch", "code", "environment", "data", "metrics")
        return {name: getattr(self, name) for name in names}

    @property
    def are_same(self) -> bool:
        return not any(self.sections.values()) and all(each.first is None for each in self.losses)

    def to_json(self) -> dict[str, Any]:
        return {"are_same": self.are_same, **asdict(self)}


def compare(runs: Sequence[RunDir]) -> Comparison:
    """Compare runs with the first one.

    Raises:
        DamagedError: a file of a run is damaged.
        RemoteStoreError: the URL of a run does not answer.
    """
    entries = [index.entry(run) for run in runs]
    plans = [_section(files.read_json(run.plan)) for run in runs]
    jobs = [entry.job for entry in entries]
    environments, data = zip(*map(_recorded, runs, plans), strict=True)
    of_code, notes = code.differences(runs, str(plans[0].get("job_dir", "")))
    fields = _different(jobs)
    of_plan = [{name: plan.get(name) for name in _OF_PLAN} for plan in plans]
    options = [_prefixed("options.", plan.get("options")) for plan in plans]
    first, *others = [losses.losses_of(run) for run in runs]
    pairs = zip(runs[1:], others, strict=True)
    recorded = {
        "code": of_code["commit"],
        "environment": [known.get("version python") for known in environments],
        "data": data,
    }
    return Comparison(
        runs=[{name: entry.row.get(name) for name in _ABOUT} for entry in entries],
        job={n: values for n, values in fields.items() if not n.startswith(_PLACEMENT)},
        launch={n: values for n, values in fields.items() if n.startswith(_PLACEMENT)}
        | _different(of_plan)
        | _different(options),
        code={name: values for name, values in of_code.items() if _differ(values)},
        environment=_different(environments),
        data=_different(data),
        metrics=_different([_metrics(entry.row) for entry in entries]),
        losses=[losses.parting(run.id, first, other) for run, other in pairs],
        unknown=[name for name, values in recorded.items() if not all(values)],
        notes=notes,
    )


def _recorded(run: RunDir, plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is recorded of the environment and of the data, by the newest attempt."""
    hosts: dict[str, str] = {}
    environment: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for event in files.read_lines(run.events, event=str, node=str, versions=dict):
        if event["event"] == "environment":
            hosts[str(event.get("node_rank"))] = event["node"]
            environment |= _prefixed("version ", event["versions"])
    for event in files.read_lines(run.events, event=str, device=str):
        if event["event"] == "training_started":
            environment["device"] = event["device"]
            data = _section(event.get("data")) or data
    commands = plan.get("commands")
    argv = _section(commands[0]).get("argv") if isinstance(commands, list) and commands else None
    environment["python"] = argv[0] if isinstance(argv, list) and argv else None
    environment["hosts"] = ", ".join(dict.fromkeys(hosts.values())) or None
    return environment | _prefixed("$", plan.get("worker_env")), data


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    found = {f"{split}.{name}": v for split in SPLITS for name, v in (row.get(split) or {}).items()}
    known = {name: v for name, v in found.items() if name.partition(".")[2] not in _SPEEDS}
    return {name: "nan" if v is None else v for name, v in known.items()}  # as JSON has no NaN


def _prefixed(prefix: str, values: Any) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in _section(values).items()}


def _section(value: Any) -> dict[str, Any]:
    """Return an object of a file that other programs may have changed; empty if it is none."""
    return value if isinstance(value, dict) else {}


def _different(of_runs: Sequence[dict[str, Any]]) -> Values:
    """Return what is not the same in all runs."""
    names = dict.fromkeys(name for values in of_runs for name in values)
    found = {name: [values.get(name) for values in of_runs] for name in names}
    return {name: values for name, values in found.items() if _differ(values)}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])
