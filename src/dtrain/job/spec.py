"""The models of job.yaml and launchers/*.yaml.

A spec is plain data: frozen, JSON-able, without I/O. However the user wrote a value (`30m`,
`16GB`), durations are in seconds and sizes in bytes after reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from dtrain import catalog
from dtrain.job.faults import late_faults
from dtrain.job.fields import (
    Count,
    Duration,
    Environment,
    Few,
    FewOrZero,
    InjectionText,
    LoggerEntry,
    Name,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Share,
    Text,
)
from dtrain.job.frameworks import job_checks
from dtrain.job.located import FieldProblem
from dtrain.job.model import Model
from dtrain.job.script import PROGRAMS, SCRIPT_FIELDS, completed, meaningless, program_of
from dtrain.job.units import parse_nodes, parse_steps


class EarlyStoppingSpec(Model):
    """A rule that stops the training when a metric no longer improves."""

    metric: Text = "loss"
    """Name of an evaluation metric that `evaluate` returns."""
    mode: Literal["min", "max"] = "min"
    """`min` if smaller values are better, `max` if larger ones are."""
    patience: Count = 3
    """Number of evaluations without improvement before training stops."""
    min_delta: NonNegative = 0.0
    """The smallest change that counts as an improvement."""


class TrainSpec(Model):
    """How the task is trained."""

    epochs: Count | None = None
    """Number of passes over the training data; give this or `steps`."""
    steps: Count | None = None
    """Number of optimizer steps; give this or `epochs`. With both, training ends at the one that
    comes first."""
    global_batch_size: Count
    """Samples per optimizer step, over all processes."""
    micro_batch_size: Count | None = None
    """Samples per forward pass in one process. None means the whole share of the process at
    once. The number of accumulated micro-batches follows from this, the world size and the
    global batch."""
    virtual_shards: Count = 8
    """For strategy `exact` only: the number of parts of every global batch. It does not depend on
    the number of processes, which must divide it. A different number is a different training."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward and backward pass; fp16 scales the loss."""
    clip_grad_norm: Positive | None = None
    """The maximum 2-norm of the whole reduced gradient."""
    compile: bool = False
    """Compile the model with torch.compile; see docs/compile.md. Strategies `single`, `ddp` and
    `fsdp` can do that."""
    activation_checkpointing: bool | Annotated[list[Text], Field(min_length=1)] = False
    """Keep no activations inside blocks of the model, and compute them again in backward, which
    needs less memory. `true` means the blocks that strategy `fsdp` gathers; or names of classes.
    The results are the same bits as without."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop early when an evaluation metric no longer improves."""


class FsdpSpec(Model):
    """Settings that apply only to strategy `fsdp`; see docs/fsdp.md."""

    wrap: Annotated[list[Text], Field(min_length=1)] | None = None
    """Names of classes. Each module of one of them is gathered as one block. None means the members
    of the outermost `ModuleList`s and `Sequential`s."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block after its forward, and gather them again for its
    backward. `false` needs more memory, and less communication."""
    param_dtype: Literal["fp32", "bf16"] | None = None
    """The type in which parameters are gathered and computed with, instead of autocast. `bf16` is
    another training: forward and backward see rounded parameters. None means their own type."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """The type in which gradients are added. None means fp32 if they have 16 bits, otherwise their
    own type."""
    cpu_offload: bool = False
    """Keep parameters, gradients and the optimizer's state in host memory, and update there. Needs
    GPUs."""
    replicas: Few = 1
    """The number of copies of the model (HSDP). Each group of processes / `replicas` neighbours
    shards one copy, and gradients are added over the copies."""


class DataSpec(Model):
    """Settings for reading samples."""

    paths: list[Text] = Field(default_factory=list)
    """Files and directories that the task reads, relative to job.yaml. They are checked before the
    launch."""
    shuffle: bool = True
    """Use a new order in each epoch, from (seed, epoch) alone. `false` keeps the order of the
    dataset."""
    stream: Literal["same", "sharded"] = "same"
    """For an iterable dataset: `same` if it gives every rank the same samples, which dtrain then
    divides among the ranks; `sharded` if it gives each rank its own samples."""
    workers: FewOrZero = 0
    """Number of loader processes per rank; 0 loads in the training process."""
    prefetch: Count = 2
    """Number of batches that each loader process loads ahead."""
    pin_memory: bool | Literal["auto"] = "auto"
    """Use page-locked host memory for faster copies. `auto` uses it with a GPU."""
    exactly_once: bool = True
    """Prove after every epoch, and before every checkpoint, that all samples were read once.
    Compare the contents of samples between ranks."""


class EvalSpec(Model):
    """The schedule of evaluations. The model is always evaluated once at the end as well."""

    every_steps: Count | None = None
    """The number of optimizer steps between evaluations."""
    every_epochs: Count | None = None
    """The number of epochs between evaluations."""
    batch_size: Count | None = None
    """Samples per forward pass and process. None means the same as in training."""


class BestSpec(Model):
    """The checkpoints that are kept even when newer ones follow."""

    metric: Text = "loss"
    """Name of an evaluation metric that `evaluate` returns."""
    mode: Literal["min", "max"] = "min"
    """`min` if smaller values are better, `max` if larger ones are."""
    keep: Count = 1
    """Number of best checkpoints that are kept."""


class CheckpointSpec(Model):
    """The schedule of checkpoints. The state is always saved once at the end as well."""

    every_steps: Count | None = None
    """The number of optimizer steps between checkpoints."""
    every_epochs: Count | None = None
    """The number of epochs between checkpoints."""
    every: Duration | Literal["auto"] | None = None
    """The time between checkpoints. Each is saved at the first step boundary after it. `auto`
    chooses the time with which the least training is lost: it measures how long training stops for
    a checkpoint, and needs `mtbf`."""
    mtbf: Duration | None = None
    """The mean time between failures of all machines of the run together, for `every: auto`."""
    keep: Count = 2
    """Number of newest checkpoints that are kept on disk."""
    best: BestSpec | None = None
    """Also keep the checkpoints that are best by an evaluation metric. The best one is also in
    `checkpoints/best`."""
    staging: Share = 0.25
    """The share of a host's memory in which its processes keep copies of their state, to write
    checkpoints while training goes on. With 0, training waits until a checkpoint is written."""
    busy: Literal["wait", "skip"] = "wait"
    """What to do if a checkpoint is due while another is being written: wait for that, or skip
    this one."""
    on_error: Literal["stop", "warn"] = "stop"
    """What to do if a checkpoint cannot be written: `stop` ends the training, `warn` continues."""
    init_from: Text | None = None
    """Start a new run with the weights of another training: a run or a checkpoint of dtrain, or a
    file or directory of another program; see docs/checkpoints.md. A path is relative to job.yaml.
    A resume continues from the run's own checkpoint."""
    init_strict: bool = True
    """With `init_from`: end with an error unless exactly the weights of the model are there. With
    `false`, those that fit by name and shape are used, and the others are reported."""


class ChecksSpec(Model):
    """Checks that all processes still train the same model, and the response when they do not."""

    every_steps: Natural = 50
    """The number of optimizer steps between comparisons of all processes. They are also compared
    before every checkpoint. 0 means never."""
    on_mismatch: Literal["stop", "warn", "rollback"] = "stop"
    """The response when replicas differ: `stop` ends with a verdict, `warn` continues, `rollback`
    returns to the newest checkpoint."""
    max_rollbacks: Count = 3
    """With on_mismatch rollback: the number of rollbacks before the run ends."""
    init: Literal["same", "broadcast"] = "same"
    """The response when model() gives processes different initial values: `same` reports an error,
    `broadcast` takes those of the first process."""
    on_nan: Literal["stop", "skip", "warn"] = "stop"
    """The response when a loss or gradient is NaN or infinite: `stop` ends with a verdict, `skip`
    omits the step on all processes, `warn` continues."""
    max_skipped: Count = 10
    """With on_nan skip: the number of consecutive skipped steps before the run ends."""
    inject: list[InjectionText] = Field(default_factory=list)
    """Faults to inject on purpose, to test the checks; see docs/checks.md."""


class LogSpec(Model):
    """Output during training."""

    every_steps: Count = 10
    """The number of optimizer steps between lines of training metrics."""
    loggers: list[LoggerEntry] = Field(default_factory=list)
    """Loggers that receive metrics in addition to `metrics.jsonl`: names, or one name with its
    options; see docs/loggers.md."""


class StepProfileSpec(Model):
    """The steps to record with torch.profiler, and the ranks that do; see docs/profiling.md."""

    steps: Annotated[
        tuple[Count, Count],
        BeforeValidator(parse_steps),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "integer", "minimum": 1},
                    {"type": "string", "pattern": r"^\d+(:\d+)?$"},
                    {"type": "array", "items": {"type": "integer", "minimum": 1}},
                ],
                "examples": ["10:15"],
            }
        ),
    ]
    """The first and the last step, `first:last`, counted from 1; or one step."""
    ranks: Annotated[list[Natural], Field(min_length=1)] | Literal["all"] = [0]
    """The ranks that record, or `all`."""

    def includes(self, rank: int) -> bool:
        """Return whether a rank records."""
        return self.ranks == "all" or rank in self.ranks


class LightningSpec(Model):
    """Settings that apply only to trainer `lightning`."""

    step: Literal["auto", "dtrain", "lightning"] = "auto"
    """The loop that makes the steps of a LightningModule. `dtrain` trains it exactly like trainer
    `native`, bit for bit. `lightning` uses Lightning's own loops. `auto` chooses dtrain where it
    can train the module unchanged."""
    data_module: Text | None = None
    """A LightningDataModule, written `file.py:Class`. None means that the LightningModule has its
    own loaders."""
    data_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""
    also_run: list[Literal["validate", "test", "predict"]] = Field(default_factory=list)
    """Further functions of Lightning's Trainer to run: `validate` before the training, `test` and
    `predict` after it. They run in Lightning's own loops."""
    find_unused: bool | None = None
    """With Lightning's own loops: make DDP search in each step for unused parameters. None means
    that it searches where the module makes its own steps."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of Lightning's Trainer, for example `logger: true`."""


class LaunchSpec(Model):
    """The number of processes, and the way they are supervised. Profiles may set these too."""

    nodes: Annotated[
        tuple[Few, Few],
        BeforeValidator(parse_nodes),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "integer", "minimum": 1},
                    {"type": "string", "pattern": r"^\d+(:\d+)?$"},
                    {"type": "array", "items": {"type": "integer", "minimum": 1}},
                ],
                "examples": [2, "2:4"],
            }
        ),
    ] = (1, 1)
    """Number of nodes, or `min:max`."""
    procs_per_node: Few | None = None
    """Number of processes per node. None means one per GPU, or one without GPUs."""
    gpus_per_node: FewOrZero = 0
    """Number of GPUs per node; 0 trains on the CPU."""
    max_restarts: Natural = 0
    """Number of times that failed workers are started again before the run fails."""
    join_timeout: Duration = 300.0
    """The time that nodes wait for one another at the start."""
    stop_timeout: Duration = 30.0
    """The time that workers have to exit cleanly when asked to stop, before they are killed."""
    collective_timeout: Duration = 1800.0
    """The time that a rank waits in a collective. A timeout that a script sets itself is kept."""
    lost_after: Annotated[Duration, Field(ge=3)] | None = None
    """The time without a heartbeat after which a node is lost. None means 30 s, or 10 min on slurm
    and ray."""
    env: Environment = Field(default_factory=dict)
    """Environment variables of every worker. A value that looks secret, by name or form, is never
    shown."""
    preload: list[Text] | None = None
    """Modules that are imported once per node before the workers are forked. They must not start
    threads. None means the modules that the task's file imports and that are known to be safe (for
    example numpy and scikit-learn)."""


class JobSpec(Model):
    """A task, its arguments, and how it is trained. It does not mention a cluster."""

    name: Name
    """Name of the run; the run directory is `runs/<name>-<id>`."""
    task: Text
    """`file.py:Class`, relative to job.yaml, or `package.module:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task's constructor."""
    script: Text | None = None
    """Instead of a task: a Python file, relative to job.yaml, that every process runs as `torchrun`
    would. Such a job has only a name, `script_args` and `launch` in addition."""
    module: Text | None = None
    """Instead of a script: a module that every process runs as `python -m` would. It is looked for
    in the directory of job.yaml first."""
    command: Annotated[list[Text], Field(min_length=1)] | None = None
    """Instead of a script: a program that every process starts, with its arguments, for example
    `[./train.sh, --fast]`. A path is relative to job.yaml. It need not be Python."""
    script_args: list[Text] = Field(default_factory=list)
    """Command line of the script or module, or further arguments of the command; `-- …` after
    `dtrain launch` replaces it."""
    accelerate_config: Text | None = None
    """For a script of Hugging Face Accelerate: its config file, relative to job.yaml. The number of
    processes is taken from it where the job gives none, and all other settings too, for example the
    mixed precision."""
    seed: Seed = 0
    """The seed of the initial weights, the data order and every random number of the training."""
    trainer: Text = "native"
    """The trainer, which provides the training loop."""
    strategy: Text = "ddp"
    """The strategy: how the processes share the work."""
    train: TrainSpec
    """How the task is trained."""
    fsdp: FsdpSpec = FsdpSpec()
    """Settings that apply only to strategy `fsdp`."""
    data: DataSpec = DataSpec()
    """Settings for reading samples."""
    eval: EvalSpec = EvalSpec()
    """The schedule of evaluations."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """The schedule of checkpoints."""
    checks: ChecksSpec = ChecksSpec()
    """Checks that all processes still train the same model, and the response when they do not."""
    log: LogSpec = LogSpec()
    """Output during training."""
    lightning: LightningSpec = LightningSpec()
    """Settings that apply only to trainer `lightning`."""
    profile: StepProfileSpec | None = None
    """Record some steps with torch.profiler; `--profile` sets it."""
    launch: LaunchSpec = LaunchSpec()
    """The number of processes, and the way they are supervised."""

    _complete = model_validator(mode="before")(staticmethod(completed))

    @property
    def program(self) -> str | None:
        """Return which of `script`, `module` and `command` it has; None if it has a task."""
        return program_of(vars(self))

    def to_plain(self) -> dict[str, Any]:
        """Return the fields that apply to this job as plain JSON, for `resolved.yaml`."""
        if self.program is None:
            only_of_scripts = {*SCRIPT_FIELDS} - {"name", "profile", "launch"}
            return self.model_dump(mode="json", exclude=only_of_scripts)
        others = {each for each in PROGRAMS if each != self.program}
        return self.model_dump(mode="json", include={*SCRIPT_FIELDS} - others)

    @model_validator(mode="after")
    def _fields_fit(self) -> JobSpec:
        own = self.model_dump(mode="json", include={*SCRIPT_FIELDS})
        problems = cross_problems(self.to_plain() | own)
        if problems:
            raise ValueError("; ".join(f"{'.'.join(keys)}: {text}" for keys, text, _ in problems))
        return self


def cross_problems(job: Mapping[str, Any]) -> list[FieldProblem]:
    """Return the problems between fields.

    The argument is plain data in which single fields may be wrong too. Both kinds of problem can
    therefore be reported at once. Checks that depend on a wrong field are skipped.
    """
    if (program := program_of(job)) is not None:
        return meaningless(job, program)
    texts = {
        "script_args": "only a script, a module or a command has a command line; a task has args",
        "accelerate_config": "Accelerate's config is for a script, a module or a command",
    }
    without = [name for name in texts if job.get(name)]
    if without:
        return [((name,), texts[name], "job.field-without-effect") for name in without]
    problems = [each for check in job_checks() for each in check.between_fields(job)]
    train, evaluation = job.get("train"), job.get("eval", {})
    if not isinstance(train, Mapping) or not isinstance(evaluation, Mapping):
        return problems
    endless = train.get("epochs") is None and train.get("steps") is None
    if endless and set(train) <= set(TrainSpec.model_fields):
        text = "give epochs or steps, or training would never end"
        problems.append((("train",), text, "job.endless-training"))
    micro, batch = train.get("micro_batch_size"), train.get("global_batch_size")
    if isinstance(micro, int | float) and isinstance(batch, int | float) and micro > batch:
        text = f"{micro} samples per forward pass are more than global_batch_size, {batch}"
        problems.append((("train", "micro_batch_size"), text, "job.micro-batch-too-large"))
    problems += late_faults(job) + _late_profile(job, train)
    problems += _strategy_problems(job, train)
    checkpoint = job.get("checkpoint")
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else {}
    if checkpoint.get("every") == "auto" and checkpoint.get("mtbf") is None:
        text = "auto needs checkpoint.mtbf, the mean time between failures, for example 12h"
        problems.append((("checkpoint", "every"), text, "job.no-mtbf"))
    during = [evaluation.get("every_steps"), evaluation.get("every_epochs")]
    if train.get("early_stopping") is not None and during == [None, None]:
        text = "needs evaluations during training; give eval.every_steps or eval.every_epochs"
        problems.append((("train", "early_stopping"), text, "job.no-evaluation-to-stop-by"))
    return problems


def _late_profile(job: Mapping[str, Any], train: Mapping[str, Any]) -> list[FieldProblem]:
    """Return the problem of a profile of steps that the training does not have."""
    profile, end = job.get("profile"), train.get("steps")
    try:
        last = parse_steps(profile["steps"])[1] if isinstance(profile, Mapping) else 0
    except (KeyError, ValueError):  # reported where the field is checked
        return []
    if not isinstance(end, int) or last <= end:
        return []
    text = f"step {last} is after the last one, {end}, of train.steps"
    return [(("profile", "steps"), text, "job.profile-after-the-end")]


def _strategy_problems(job: Mapping[str, Any], train: Mapping[str, Any]) -> list[FieldProblem]:
    """Return the settings that the strategy does not have, or that exclude one another."""
    problems: list[FieldProblem] = []
    strategy, section = job.get("strategy", "ddp"), job.get("fsdp")
    if train.get("compile") is True and (problem := catalog.compile_problem(strategy)):
        problems.append((("train", "compile"), problem, "plan.unsupported-combination"))
    if not isinstance(section, Mapping):
        return problems
    if strategy != "fsdp":
        defaults = FsdpSpec().model_dump()
        text = "is for strategy fsdp; set that, or leave this out"
        return problems + [
            (("fsdp", name), text, "job.field-without-effect")
            for name, value in section.items()
            if name in defaults and value != defaults[name]
        ]
    if section.get("param_dtype") and train.get("precision", "fp32") != "fp32":
        text = (
            f"replaces autocast, which train.precision: {train['precision']} asks for; leave one "
            "of them out"
        )
        problems.append((("fsdp", "param_dtype"), text, "job.two-precisions"))
    return problems


def sharded_problem(job: JobSpec, world_sizes: Sequence[int]) -> str | None:
    """Return why `data.stream: sharded` cannot work, or None when it can or is not requested.

    Args:
        job: the job to launch.
        world_sizes: every number of processes that the launch may have.
    """
    if job.data.stream == "same":
        return None
    if job.strategy == "exact":
        return (
            "strategy 'exact' gives the same bits on any number of processes, which a stream that "
            "shards itself cannot (data.stream: sharded): each number reads in another order; "
            "use 'ddp', or a stream that is the same on every rank"
        )
    if len(world_sizes) > 1:
        return (
            f"launch.nodes allows {len(world_sizes)} different numbers of processes, but with "
            "data.stream: sharded a restart needs as many as the start, because each continues "
            "its own stream; give one number of nodes"
        )
    batch = job.train.global_batch_size
    if world_sizes[0] > batch:
        return (
            f"train.global_batch_size is {batch}, less than the {world_sizes[0]} processes; with "
            "data.stream: sharded a step takes one sample or more of each process's own stream"
        )
    return None


class ProfileSpec(Model):
    """The facts of one cluster or machine: `launchers/NAME.yaml`."""

    launcher: Text
    """The launcher that this profile is for."""
    extends: Text | None = None
    """The name of another profile. Its values apply where this one has none."""
    description: Text = ""
    """One line that `dtrain plan --explain` prints."""
    launch: LaunchSpec = LaunchSpec()
    """Defaults for the job's `launch:` section."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the launcher itself (an address, a partition). The launcher checks them."""
