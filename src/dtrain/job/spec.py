"""The models behind job.yaml and launchers/*.yaml.

A spec is dead data: frozen, JSON-able, no I/O. Fields are named with their unit's meaning;
durations are seconds and sizes bytes once read, whatever the user wrote (`30m`, `16GB`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

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
    Text,
)
from dtrain.job.frameworks import job_checks
from dtrain.job.located import FieldProblem
from dtrain.job.script import SCRIPT_FIELDS, completed, meaningless
from dtrain.job.units import parse_nodes


class Model(BaseModel):
    """Base of every spec: unknown keys are errors, values never change, nothing is coerced."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class EarlyStoppingSpec(Model):
    """Stop when a metric no longer gets better."""

    metric: Text = "loss"
    """Name of an evaluation metric, as `evaluate` returns it."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    patience: Count = 3
    """Evaluations without improvement before training stops."""
    min_delta: NonNegative = 0.0
    """How much better counts as better."""


class TrainSpec(Model):
    """How the task is trained."""

    epochs: Count | None = None
    """Passes over the training data; give this or `steps`."""
    steps: Count | None = None
    """Optimizer steps; give this or `epochs`. With both, whichever comes first."""
    global_batch_size: Count
    """Samples per optimizer step, over all processes."""
    micro_batch_size: Count | None = None
    """Samples per forward pass in one process; None: all of the process's share at once. The
    number of accumulated micro-batches follows from this, the world size and the global batch."""
    virtual_shards: Count = 8
    """Strategy `exact` only: parts into which every global batch is cut, whatever the number of
    processes, which must divide it. Another number is another training."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of forward and backward; fp16 scales the loss."""
    clip_grad_norm: Positive | None = None
    """Largest 2-norm of the whole reduced gradient."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop early when an evaluation metric no longer improves."""


class DataSpec(Model):
    """How samples are read."""

    paths: list[Text] = Field(default_factory=list)
    """Files and folders that the task reads, relative to job.yaml; checked before anything
    starts."""
    shuffle: bool = True
    """A new order each epoch, from (seed, epoch) alone; false: dataset order."""
    stream: Literal["same", "sharded"] = "same"
    """Of a data set that can only be iterated: it gives every rank the same samples, which dtrain
    deals out; or each rank its own."""
    workers: FewOrZero = 0
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: Count = 2
    """Batches loaded ahead by each loader process."""
    pin_memory: bool | Literal["auto"] = "auto"
    """Page-locked host memory for faster copies; auto: with a GPU."""
    exactly_once: bool = True
    """Prove after every epoch, and before every checkpoint, that all samples were read once, and
    compare what samples hold between ranks."""


class EvalSpec(Model):
    """When the model is evaluated; always once at the end as well."""

    every_steps: Count | None = None
    """Evaluate after every so many optimizer steps."""
    every_epochs: Count | None = None
    """Evaluate after every so many epochs."""
    batch_size: Count | None = None
    """Samples per forward pass and process; None: as in training."""


class BestSpec(Model):
    """Which checkpoint is kept whatever comes after it."""

    metric: Text = "loss"
    """Name of an evaluation metric, as `evaluate` returns it."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""


class CheckpointSpec(Model):
    """When the state is saved; always once at the end as well."""

    every_steps: Count | None = None
    """Save after every so many optimizer steps."""
    every_epochs: Count | None = None
    """Save after every so many epochs."""
    every: Duration | None = None
    """Save at the first step boundary after so much time."""
    keep: Count = 2
    """How many of the newest checkpoints stay on disk."""
    best: BestSpec | None = None
    """Keep the best by an evaluation metric too, as `checkpoints/best`."""


class ChecksSpec(Model):
    """Whether the processes still train one model, and what happens when they do not."""

    every: Natural = 50
    """Compare all processes after every so many optimizer steps, and before every checkpoint;
    0: never."""
    on_mismatch: Literal["stop", "warn", "rollback"] = "stop"
    """When replicas differ: end with a verdict, go on, or go back to the newest checkpoint."""
    max_rollbacks: Count = 3
    """With on_mismatch rollback: how often before the run ends."""
    init: Literal["same", "broadcast"] = "same"
    """When model() gives processes other initial values: an error, or take the first's."""
    on_nan: Literal["stop", "skip", "warn"] = "stop"
    """When a loss or gradient is NaN or infinite: end with a verdict, leave out the step on all
    processes, or go on."""
    max_skipped: Count = 10
    """With on_nan skip: how many steps in a row before the run ends."""
    inject: list[InjectionText] = Field(default_factory=list)
    """Faults to make on purpose, to see the checks at work; see docs/checks.md."""


class LogSpec(Model):
    """What is written while training."""

    every_steps: Count = 10
    """A line of training metrics after every so many optimizer steps."""
    loggers: list[LoggerEntry] = Field(default_factory=list)
    """Where metrics go besides `metrics.jsonl`: names, or one name with its options; see
    docs/loggers.md."""


class LightningSpec(Model):
    """What only trainer `lightning` has."""

    step: Literal["auto", "dtrain", "lightning"] = "auto"
    """Who makes the steps of a LightningModule: dtrain, as under trainer `native`, bit for bit; or
    Lightning, in its own loops. auto: dtrain, where the module can be trained so as it is."""
    data_module: Text | None = None
    """A LightningDataModule, as `file.py:Class`; None: the LightningModule has its loaders."""
    data_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""
    also_run: list[Literal["validate", "test", "predict"]] = Field(default_factory=list)
    """What of Lightning's Trainer is run besides: `validate` before the training, `test` and
    `predict` after it. Lightning's own loops do."""
    find_unused: bool | None = None
    """With Lightning's own loops: whether DDP looks in each step for parameters that it leaves out.
    None: where the module makes its own steps."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of Lightning's Trainer, as `logger: true`."""


class LaunchSpec(Model):
    """How many processes, and how they are looked after. Profiles may set these too."""

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
    """Processes per node; None: one per GPU, or one."""
    gpus_per_node: FewOrZero = 0
    """GPUs per node; 0 trains on the CPU."""
    max_restarts: Natural = 0
    """How often failed workers are started again before the run fails."""
    join_timeout: Duration = 300.0
    """How long nodes wait for one another at the start."""
    stop_timeout: Duration = 30.0
    """How long workers may take to leave in order when asked to, before they are killed."""
    collective_timeout: Duration = 1800.0
    """How long a rank waits in a collective. A timeout that a script sets itself is kept."""
    lost_after: Annotated[Duration, Field(ge=3)] | None = None
    """After how long without a heartbeat a node is lost. None: 30 s, on slurm and ray 10 min."""
    env: Environment = Field(default_factory=dict)
    """Environment variables of every worker. What looks secret, by name or form, is never shown."""
    preload: list[Text] | None = None
    """Modules imported once per node before the workers are forked, which must not start threads.
    None: those that the task's file imports and that are known to be safe (numpy, scikit-learn
    and the like)."""


class JobSpec(Model):
    """A task, its arguments, and how it is trained. Says nothing of any cluster."""

    name: Name
    """Name of the run; the run directory is `runs/<name>-<id>`."""
    task: Text
    """`file.py:Class`, relative to job.yaml, or `package.module:Class`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task's constructor."""
    script: Text | None = None
    """Instead of a task: a Python file, relative to job.yaml, that every process runs as `torchrun`
    would. Besides it a job has a name, `arguments` and `launch`."""
    arguments: list[Text] = Field(default_factory=list)
    """Command line of the script; `-- …` after `dtrain launch` replaces it."""
    seed: Seed = 0
    """Decides initial weights, data order and every random number of the training."""
    trainer: Text = "native"
    """Whose loop runs."""
    strategy: Text = "ddp"
    """How the processes share the work."""
    train: TrainSpec
    """How the task is trained."""
    data: DataSpec = DataSpec()
    """How samples are read."""
    eval: EvalSpec = EvalSpec()
    """When the model is evaluated."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When the state is saved."""
    checks: ChecksSpec = ChecksSpec()
    """Whether the processes still train one model, and what happens when they do not."""
    log: LogSpec = LogSpec()
    """What is written while training."""
    lightning: LightningSpec = LightningSpec()
    """What only trainer `lightning` has."""
    launch: LaunchSpec = LaunchSpec()
    """How many processes, and how they are looked after."""

    _complete = model_validator(mode="before")(staticmethod(completed))

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON, for `resolved.yaml`: what means something for this job."""
        included = set(SCRIPT_FIELDS) if self.script is not None else None
        return self.model_dump(mode="json", include=included)

    @model_validator(mode="after")
    def _fields_fit(self) -> JobSpec:
        problems = cross_problems(self.to_plain())
        if problems:
            raise ValueError("; ".join(f"{'.'.join(keys)}: {text}" for keys, text, _ in problems))
        return self


def cross_problems(job: Mapping[str, Any]) -> list[FieldProblem]:
    """What is wrong between fields.

    Takes plain data in which single fields may be wrong too, so that both kinds of problem can
    be told at once; what depends on a wrong field is passed over.
    """
    if job.get("script") is not None:
        return meaningless(job)
    if job.get("arguments"):
        text = "only a script has a command line; a task has args"
        return [(("arguments",), text, "job.field-without-effect")]
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
    problems += late_faults(job)
    during = [evaluation.get("every_steps"), evaluation.get("every_epochs")]
    if train.get("early_stopping") is not None and during == [None, None]:
        text = "needs evaluations during training; give eval.every_steps or eval.every_epochs"
        problems.append((("train", "early_stopping"), text, "job.no-evaluation-to-stop-by"))
    return problems


def sharded_problem(job: JobSpec, world_sizes: Sequence[int]) -> str | None:
    """Why `data.stream: sharded` cannot be; None when it can, or is not asked for.

    Args:
        job: as it is launched.
        world_sizes: every number of processes that the launch may come to.
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
            f"launch.nodes may come to {len(world_sizes)} sizes, and with data.stream: sharded a "
            "restart needs as many processes as the start: each goes on in its own stream; give "
            "one number of nodes"
        )
    batch = job.train.global_batch_size
    if world_sizes[0] > batch:
        return (
            f"train.global_batch_size is {batch}, less than the {world_sizes[0]} processes; with "
            "data.stream: sharded a step takes one sample or more of each process's own stream"
        )
    return None


class ProfileSpec(Model):
    """The facts of one place: `launchers/NAME.yaml`."""

    launcher: Text
    """The launcher that this profile is for."""
    extends: Text | None = None
    """Another profile, by name, whose values hold where this one says nothing."""
    description: Text = ""
    """One line, shown by `dtrain plan --explain`."""
    launch: LaunchSpec = LaunchSpec()
    """Defaults for the job's `launch:` section."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the launcher itself (an address, a partition); checked by the launcher."""
