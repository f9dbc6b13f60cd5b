"""The `options:` of a Slurm profile, and the flags of sbatch that they become."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dtrain.job.fields import Count, Duration, Natural, Text
from dtrain.job.launcher_options import LauncherOptions, Switch
from dtrain.job.units import found, parse_duration

_UNITS = (
    "say it with a unit, as 90m or 20h: a bare number is minutes to Slurm and seconds elsewhere"
)


def _no_line_break(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # an account may be a number
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("a line break or control character cannot stand in a batch script")
    return value


def _flag(value: Any) -> Any:
    return [_no_line_break(v) for v in value] if isinstance(value, list) else _no_line_break(value)


def _time_limit(value: Any) -> Any:
    """As Slurm reads it, `D-HH:MM:SS`, from any duration that has a unit."""
    if value is None:
        return None
    if isinstance(value, int | float) or str(value).strip().isdigit():
        raise ValueError(f"{_UNITS}; found {found(value)}")
    seconds = int(parse_duration(value))
    if seconds < 60:
        raise ValueError(f"Slurm counts in minutes; found {found(value)}")
    return as_slurm_writes(seconds)


def as_slurm_writes(duration_s: int) -> str:
    """`D-HH:MM:SS`."""
    minutes, seconds = divmod(duration_s, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


SlurmText = Annotated[Text, BeforeValidator(_no_line_break)]
"""One line of text; a bare number is taken for text."""

TimeLimit = Annotated[str, BeforeValidator(_time_limit)]
"""A duration with a unit, kept as Slurm writes it."""

Flag = Annotated[bool | str | list[str], BeforeValidator(_flag)]
"""Value of a flag of sbatch: true for one without a value, a list for one given several times."""


class SlurmOptions(LauncherOptions):
    """What a profile says in `options:`; launchers/slurm.yaml tells of each."""

    launcher = "slurm"

    submit: Literal["sbatch", "submitit"] = "sbatch"
    """How the job is submitted."""
    partition: SlurmText | None = None
    """Partition, or several with commas."""
    account: SlurmText | None = None
    """Account that pays."""
    time: TimeLimit | None = None
    """Time limit of one attempt; cut to that of the partition."""
    qos: SlurmText | None = None
    """Quality of service."""
    cpus_per_node: Count | None = None
    """CPUs of each node; None: one per process."""
    mem: SlurmText | None = None
    """Memory of each node, as 64G."""
    gres: SlurmText | None = None
    """Generic resources of each node, instead of --gpus-per-node."""
    constraint: SlurmText | None = None
    """Features that nodes must have."""
    exclude: SlurmText | None = None
    """Nodes to keep away from."""
    reservation: SlurmText | None = None
    """Reservation to run in."""
    dependency: SlurmText | None = None
    """What the job waits for."""
    mail: SlurmText | None = None
    """Who hears of the end and of failures."""
    comment: SlurmText | None = None
    """Said in the job's comment, after the run's id."""
    slurm: dict[str, Flag] = Field(default_factory=dict)
    """Any other flag of sbatch by its long name."""
    signal_before: Duration = 120.0
    """Seconds before the time limit at which the workers are asked to leave; at most half of it."""
    requeue: Natural = 100
    """How often the job may be requeued."""
    setup: list[Text] = Field(default_factory=list)
    """Lines of shell, run before the agents start."""
    modules: list[Text] = Field(default_factory=list)
    """Environment modules to load."""
    venv: Text | None = None
    """Folder of a virtual environment to activate."""
    conda: Text | None = None
    """Conda environment to activate."""
    apptainer: Text | None = None
    """Image in which `apptainer exec` runs the agents."""
    pyxis: Text | None = None
    """Image in which Pyxis runs the agents."""
    container_args: list[Text] = Field(default_factory=list)
    """Further arguments for the container."""
    python: Text | None = None
    """Interpreter of the agents."""
    snapshot: Switch = "on"
    """Whether workers import a copy of the code taken at submission."""
    template: Text | None = None
    """Path of a template to use instead of the packaged one."""

    @property
    def cores_per_node(self) -> int | None:
        return self.cpus_per_node

    @model_validator(mode="after")
    def _one_container(self) -> SlurmOptions:
        if self.apptainer and self.pyxis:
            raise ValueError("apptainer and pyxis are two ways to run one container: give one")
        return self


# field of the options → flag of sbatch
FLAGS = {
    "partition": "partition",
    "account": "account",
    "time": "time",
    "qos": "qos",
    "mem": "mem",
    "gres": "gres",
    "constraint": "constraint",
    "exclude": "exclude",
    "reservation": "reservation",
    "dependency": "dependency",
}

# flags that dtrain sets itself, or that would break it → what to use instead
_OURS = {
    "nodes": "--nodes",
    "ntasks": "--procs",
    "ntasks-per-node": "--procs",
    "cpus-per-task": "option cpus_per_node",
    "job-name": "--name",
    "output": "`dtrain logs`",
    "error": "`dtrain logs`",
    "open-mode": "nothing: dtrain needs it so",
    "requeue": "option requeue",
    "no-requeue": "option requeue: 0",
    "signal": "option signal_before",
    "array": "--array FIELD=VALUE,VALUE",
    "comment": "option comment",
    "wrap": "option setup",
    "parsable": "nothing: dtrain needs it so",
    "test-only": "`dtrain plan`",
    "wait": "nothing: without --detach the command waits",
}


def own_flag_problem(name: str) -> str | None:
    """Why a flag cannot be among the further flags of sbatch; None when it can."""
    plain = name.lstrip("-").replace("_", "-")
    if plain in FLAGS.values():
        field = next(field for field, flag in FLAGS.items() if flag == plain)
        return f"is an option of its own: say {field} instead"
    return f"cannot be set here; use {_OURS[plain]}" if plain in _OURS else None
