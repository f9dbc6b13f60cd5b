"""The `options:` of a Slurm profile, and the corresponding flags of sbatch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dtrain.job.fields import Count, Duration, Natural, Text
from dtrain.job.launcher_options import LauncherOptions
from dtrain.job.units import found, parse_duration

_UNITS = (
    "add a unit, for example 90m or 20h: a number alone is minutes for Slurm and seconds elsewhere"
)


def _no_line_break(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # an account may be a number
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("a batch script cannot contain a line break or control character here")
    return value


def _flag(value: Any) -> Any:
    return [_no_line_break(v) for v in value] if isinstance(value, list) else _no_line_break(value)


def _time_limit(value: Any) -> Any:
    """Convert any duration with a unit to Slurm's form, `D-HH:MM:SS`."""
    if value is None:
        return None
    if isinstance(value, int | float) or str(value).strip().isdigit():
        raise ValueError(f"{_UNITS}; found {found(value)}")
    seconds = int(parse_duration(value))
    if seconds < 60:
        raise ValueError(f"the minimum is one minute; found {found(value)}")
    return as_slurm_writes(seconds)


def as_slurm_writes(duration_s: int) -> str:
    """Return a duration as `D-HH:MM:SS`."""
    minutes, seconds = divmod(duration_s, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


SlurmText = Annotated[Text, BeforeValidator(_no_line_break)]
"""One line of text. A bare number is accepted as text."""

TimeLimit = Annotated[str, BeforeValidator(_time_limit)]
"""A duration with a unit, stored in Slurm's form."""

Flag = Annotated[bool | str | list[str], BeforeValidator(_flag)]
"""The value of a flag of sbatch. True means a flag without a value, a list a repeated flag."""


class SlurmOptions(LauncherOptions):
    """Options of launcher `slurm`; most are flags of sbatch."""

    launcher = "slurm"
    further = "; any other flag of sbatch is slurm.FLAG, for example -o slurm.nice=100"

    submit: Literal["sbatch", "submitit"] = "sbatch"
    """The way to submit the job."""
    partition: SlurmText | None = None
    """The partition. Empty means the cluster's default."""
    account: SlurmText | None = None
    """The account. Empty means the user's default."""
    time: TimeLimit | None = None
    """The time limit of one attempt, for example 4h. The partition's limit is the maximum."""
    qos: SlurmText | None = None
    """The quality of service."""
    cpus_per_node: Count | None = None
    """Number of CPUs of each node. Empty means one per process."""
    mem: SlurmText | None = None
    """Memory of each node, for example 64G. 0 means all of it."""
    gres: SlurmText | None = None
    """Generic resources of each node. Empty means the GPUs of --gpus."""
    constraint: SlurmText | None = None
    """Features that nodes must have."""
    exclude: SlurmText | None = None
    """Nodes to exclude."""
    reservation: SlurmText | None = None
    """The reservation to run in."""
    dependency: SlurmText | None = None
    """Jobs to wait for, for example afterok:123; see --after."""
    mail: SlurmText | None = None
    """The address that gets a mail when the job ends, fails or is requeued."""
    comment: SlurmText | None = None
    """A comment of the job, added to the run's id."""
    slurm: dict[str, Flag] = Field(default_factory=dict)
    """Other flags of sbatch, for example slurm.nice=100."""
    signal_before: Duration = 120.0
    """The time before the time limit at which workers save and exit; at most half of the limit."""
    requeue: Natural = 100
    """Number of times that the job may be requeued for a further attempt."""
    setup: list[Text] = Field(default_factory=list)
    """Shell lines that run before the agents start."""
    modules: list[Text] = Field(default_factory=list)
    """Environment modules to load."""
    venv: Text | None = None
    """The directory of a virtual environment."""
    conda: Text | None = None
    """The name or directory of a conda environment."""
    apptainer: Text | None = None
    """The image in which the agents run, by apptainer exec."""
    pyxis: Text | None = None
    """The image in which the agents run, by srun --container-image."""
    container_args: list[Text] = Field(default_factory=list)
    """Further arguments of apptainer exec, or of srun for pyxis."""
    python: Text | None = None
    """The Python interpreter. Empty means that of venv, conda or image, or of this command."""
    snapshot: bool = True
    """Train the code as it was at submission, not as it is when the job starts."""
    template: Text | None = None
    """A Jinja2 template of the batch script, instead of the packaged one."""

    @property
    def cores_per_node(self) -> int | None:
        return self.cpus_per_node

    @model_validator(mode="after")
    def _check_combination(self) -> SlurmOptions:
        if self.apptainer and self.pyxis:
            raise ValueError("apptainer and pyxis are two ways to run one container: choose one")
        if self.template and self.submit == "submitit":
            raise ValueError("template needs submit: sbatch; submitit writes its own script")
        return self


# options that are flags of sbatch with the same name
FLAGS = (
    "partition", "account", "time", "qos", "mem", "gres", "constraint", "exclude", "reservation",
    "dependency",
)  # fmt: skip

# flags that dtrain sets itself, or that would break the job → what to use instead, if anything
_RESERVED = {
    "nodes": "--nodes",
    "ntasks": "--procs",
    "ntasks-per-node": "--procs",
    "cpus-per-task": "option cpus_per_node",
    "job-name": "--name",
    "output": "`dtrain logs`",
    "error": "`dtrain logs`",
    "open-mode": "",
    "requeue": "option requeue",
    "no-requeue": "option requeue: 0",
    "signal": "option signal_before",
    "array": "--sweep FIELD=VALUE,VALUE",
    "comment": "option comment",
    "wrap": "option setup",
    "parsable": "",
    "test-only": "`dtrain plan`",
    "wait": "`dtrain launch` without --detach",
}


def own_flag_problem(flag: str) -> str | None:
    """Return why a flag cannot be among the further flags of sbatch, or None when it can."""
    if flag in FLAGS:
        return f"is a separate option: write {flag} instead of slurm.{flag}"
    if flag not in _RESERVED:
        return None
    alternative = _RESERVED[flag]
    return f"cannot be set here; use {alternative}" if alternative else "is always set by dtrain"
