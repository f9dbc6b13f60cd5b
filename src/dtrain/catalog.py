"""The existing launchers, strategies, trainers and loggers, and which of them work together.

It contains facts only and does not import what they name: the launch plane reads it without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dtrain.errors import PlanError


@dataclass(frozen=True)
class Needs:
    """The packages that something needs."""

    modules: tuple[str, ...] = ()
    """The names under which they are imported."""
    extra: str = ""
    """The pip extra that installs them."""

    def problem(self, what: str) -> str | None:
        """Return what is missing here, with its pip command; None if nothing is. Import nothing."""
        missing = [module for module in self.modules if find_spec(module) is None]
        if not missing:
            return None
        return f"{what} needs {' and '.join(missing)}: pip install 'dtrain[{self.extra}]'"


NOTHING = Needs()


@dataclass(frozen=True)
class Fact:
    target: str
    """`module:Class`, imported when used."""
    needs: Needs = NOTHING


@dataclass(frozen=True)
class LauncherFact(Fact):
    allocates: bool = False
    """True if nodes come with the cores that the job requests, independent of this host's cores."""
    simulates: bool = False
    """True if all nodes are on this host."""
    urls: bool = False
    """True if runs may be kept at a URL, by nodes without a shared filesystem."""


@dataclass(frozen=True)
class StrategyFact(Fact):
    """A way in which the processes share the work."""

    summary: str = ""
    one_process: bool = False
    """True if there is one process in all (`single`) or per node (`dp`), independent of --procs."""
    multi_node: bool = True
    compiles: bool = False
    """True if it can train a model that torch.compile has compiled."""
    virtual_shards: bool = False
    """True if it distributes `train.virtual_shards`, which the number of processes must divide."""


@dataclass(frozen=True)
class TrainerFact(Fact):
    strategies: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameworkFact(Fact):
    """A library whose own models can be the task of a job. The target is a `load.Adapter`."""

    job_check: str = ""
    """The `dtrain.job.frameworks.JobCheck` that reads a job before a launch."""


@dataclass(frozen=True)
class ExportFact:
    """A format in which a trained model is written."""

    suffix: str
    needs: Needs = NOTHING


LIGHTNING = ("pytorch_lightning", "lightning")
"""The names under which the packages of Lightning are imported."""

OWN_LOOPS = ("single", "ddp", "fsdp")
"""The strategies of Lightning's own loops, `lightning.step: lightning`."""

SCRIPT = "script"
"""The trainer of a job that has a script instead of a task."""
OWN = "own"
"""The strategy of a script, which distributes its work itself."""

_KERAS = Needs(("keras",), "keras")
_STRATEGIES = "dtrain.train.strategies"
_INTEGRATIONS = "dtrain.integrations"
_LOGGERS = "dtrain.train.metrics.loggers"

LAUNCHERS: Mapping[str, LauncherFact] = {
    "local": LauncherFact("dtrain.launchers.local:LocalLauncher", simulates=True, urls=True),
    "torchrun": LauncherFact("dtrain.launchers.torchrun:TorchrunLauncher"),
    "slurm": LauncherFact("dtrain.launchers.slurm.launcher:SlurmLauncher", allocates=True),
    "ray": LauncherFact(
        "dtrain.launchers.ray.launcher:RayLauncher",
        Needs(("ray",), "ray"),
        allocates=True,
        urls=True,
    ),
}

STRATEGIES: Mapping[str, StrategyFact] = {
    "single": StrategyFact(
        f"{_STRATEGIES}.base:SingleStrategy",
        summary="one process, the reference for all others",
        one_process=True,
        multi_node=False,
        compiles=True,
    ),
    "dp": StrategyFact(
        f"{_STRATEGIES}.dp:DataParallelStrategy",
        summary="nn.DataParallel: one process, one replica per device",
        one_process=True,
        multi_node=False,
    ),
    "ddp": StrategyFact(
        f"{_STRATEGIES}.ddp:DDPStrategy",
        summary="DistributedDataParallel: one process per device, gradients all-reduced",
        compiles=True,
    ),
    "fsdp": StrategyFact(
        f"{_STRATEGIES}.fsdp:FSDPStrategy",
        summary="FSDP2 fully_shard: parameters, gradients and optimizer state sharded over the "
        "processes",
        compiles=True,
    ),
    "exact": StrategyFact(
        f"{_STRATEGIES}.exact.strategy:ExactStrategy",
        summary="virtual shards added up in one fixed tree: the same bits on any number of "
        "processes",
        virtual_shards=True,
    ),
}

TRAINERS: Mapping[str, TrainerFact] = {
    "native": TrainerFact("dtrain.train.loop.native:NativeTrainer", strategies=tuple(STRATEGIES)),
    "lightning": TrainerFact(
        f"{_INTEGRATIONS}.lightning.adapter:make_trainer",
        Needs(LIGHTNING[:1], "lightning"),
        strategies=("single", "ddp", "fsdp", "exact"),
    ),
    SCRIPT: TrainerFact(f"{_INTEGRATIONS}.script.run:run_script"),
}

FRAMEWORKS: Mapping[str, FrameworkFact] = {
    "lightning": FrameworkFact(
        f"{_INTEGRATIONS}.lightning.adapter:LightningAdapter",
        job_check=f"{_INTEGRATIONS}.lightning.job_check:LightningCheck",
    ),
    "keras": FrameworkFact(
        f"{_INTEGRATIONS}.keras.adapter:KerasAdapter",
        _KERAS,
        job_check=f"{_INTEGRATIONS}.keras.job_check:KerasCheck",
    ),
}

EXPORTS: Mapping[str, ExportFact] = {
    "safetensors": ExportFact(".safetensors", Needs(("safetensors",), "export")),
    "torch-export": ExportFact(".pt2"),
    "onnx": ExportFact(".onnx", Needs(("onnx", "onnxscript", "onnxruntime"), "export")),
    "keras": ExportFact(".keras", _KERAS),
}

LOGGERS: Mapping[str, Fact] = {
    "csv": Fact(f"{_LOGGERS}:Csv"),
    "tensorboard": Fact(f"{_LOGGERS}:TensorBoard", Needs(("tensorboard",), "loggers")),
    "mlflow": Fact(f"{_LOGGERS}:MLflow", Needs(("mlflow",), "mlflow")),
    "wandb": Fact(f"{_LOGGERS}:Wandb", Needs(("wandb",), "wandb")),
    "comet": Fact(f"{_LOGGERS}:Comet", Needs(("comet_ml",), "comet")),
}

PLACEMENTS: Mapping[str, Fact] = {
    "argv": Fact("dtrain.node.placement.argv:ArgvPlacement"),
    "slurm": Fact("dtrain.node.placement.slurm:SlurmPlacement"),
    "ray": Fact("dtrain.node.placement.ray:RayPlacement"),
}

_TABLES: Mapping[str, Mapping[str, Fact]] = {
    "launcher": LAUNCHERS,
    "strategy": STRATEGIES,
    "trainer": TRAINERS,
    "framework": FRAMEWORKS,
    "logger": LOGGERS,
    "placement": PLACEMENTS,
}

ENTRY_POINT_GROUPS = {
    "launcher": "dtrain.launchers",
    "strategy": "dtrain.strategies",
    "logger": "dtrain.loggers",
    "placement": "dtrain.placements",
}


def find(kind: str, name: str) -> str:
    """Return the `module:Class` of a name, from the tables above or from an entry point.

    Args:
        kind: `launcher`, `strategy`, `trainer`, `framework`, `logger` or `placement`.
        name: the name in job.yaml; for a placement, the one that the launcher gives.

    Raises:
        PlanError: nothing of that kind has this name.
    """
    table = _TABLES[kind]
    if name in table:
        return table[name].target
    external = _from_entry_points(kind)
    if name in external:
        return external[name]
    raise PlanError(
        f"unknown {kind} {name!r}; known: {', '.join(names(kind))}", code="plan.unknown-name"
    )


def names(kind: str) -> list[str]:
    return [
        *_TABLES[kind],
        *(name for name in _from_entry_points(kind) if name not in _TABLES[kind]),
    ]


def load(kind: str, name: str) -> Any:
    return imported(find(kind, name))


def imported(target: str) -> Any:
    """Import and return what `module:Class` names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def launcher(name: str) -> LauncherFact:
    """Return the facts of a launcher. For one from an entry point, only its target is known."""
    return LAUNCHERS.get(name) or LauncherFact(find("launcher", name))


def problem_of(kind: str, name: str) -> str | None:
    """Return what a launcher, trainer or logger lacks here, with the pip command; or None."""
    fact: Fact | None = _TABLES[kind].get(name)
    return None if fact is None else fact.needs.problem(f"{kind} {name!r}")


def url_problem(launcher: str) -> str | None:
    """Return why runs by a launcher cannot be kept at a URL; None if they can."""
    fact = LAUNCHERS.get(launcher)
    if fact is None or fact.urls:
        return None
    able = " and ".join(repr(name) for name, each in LAUNCHERS.items() if each.urls)
    return (
        f"launcher {launcher!r} needs a directory for --runs, one that all nodes share; "
        f"launchers {able} take a URL"
    )


def pair_problem(trainer: str, strategy: str, nodes: int) -> str | None:
    """Return why a trainer, a strategy and a node count do not work together; None if they do.

    The sentence names the closest combination that works.
    """
    if trainer == SCRIPT and strategy != OWN:
        return (
            f"a program of your own sets up DDP or FSDP itself, so strategy {strategy!r} does not "
            "apply: leave the strategy out, or write the training as a task, which trainer "
            "'native' trains under any"
        )
    trainer_fact = TRAINERS.get(trainer)
    if trainer_fact is not None and strategy in STRATEGIES:
        if strategy not in trainer_fact.strategies:
            return (
                f"trainer {trainer!r} has no strategy {strategy!r}; "
                f"it has: {', '.join(trainer_fact.strategies)}"
            )
        if nodes > 1 and not STRATEGIES[strategy].multi_node:
            return f"strategy {strategy!r} runs on one node, not {nodes}; use 'ddp' or --nodes 1"
    return None


def own_loops_problem(strategy: str, nodes: int = 1) -> str | None:
    """Return why Lightning's own loops cannot train with a strategy; None if they can."""
    if strategy in STRATEGIES and strategy not in OWN_LOOPS:
        return (
            f"Lightning's own loops have no strategy {strategy!r} here; they have: "
            f"{', '.join(OWN_LOOPS)}"
        )
    return pair_problem("lightning", strategy, nodes)


def compile_problem(strategy: Any) -> str | None:
    """Return why a strategy cannot train a compiled model; None if it can, or is not known."""
    fact = STRATEGIES.get(strategy) if isinstance(strategy, str) else None
    if fact is None or fact.compiles:
        return None
    able = ", ".join(name for name, each in STRATEGIES.items() if each.compiles)
    return f"strategy {strategy!r} {_NOT_COMPILED[strategy]}; these compile: {able}"


_NOT_COMPILED: Mapping[str, str] = {
    "dp": "copies the model in each step, and would compile each copy",
    "exact": "promises the same bits on any number of processes, but the bits of compiled code "
    "depend on the sizes of the batches that each process has seen before",
}


def replicas_problem(strategy: str, replicas: int, world_sizes: Iterable[int]) -> str | None:
    """Return why some number of processes cannot share `fsdp.replicas` copies; None if all can."""
    if strategy != "fsdp":
        return None
    for world_size in world_sizes:
        if world_size % replicas:
            return (
                f"fsdp.replicas is {replicas}, but {world_size} processes cannot form that many "
                f"groups of equal size; use a multiple of {replicas} processes"
            )
    return None


def own_loops_setting_problem(train: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a setting of `train` that Lightning's own loops do not have, and what to do."""
    for name, instead in (
        ("compile", "call self.layer.compile() for the layers in configure_model()"),
        ("activation_checkpointing", "call torch.utils.checkpoint.checkpoint in the module"),
    ):
        if train.get(name):
            return name, f"is for dtrain's step, and Lightning's own loops train here: {instead}"
    return None


def shard_problem(strategy: str, virtual_shards: int, world_sizes: Iterable[int]) -> str | None:
    """Return why some number of processes cannot share the virtual shards evenly; None if all can.

    Args:
        strategy: the name of the strategy. Most strategies have no virtual shards.
        virtual_shards: `train.virtual_shards`.
        world_sizes: every number of processes that the launch may have.
    """
    fact = STRATEGIES.get(strategy)
    if fact is None or not fact.virtual_shards:
        return None
    for world_size in world_sizes:
        if virtual_shards % world_size:
            divisors = [n for n in range(1, virtual_shards + 1) if virtual_shards % n == 0]
            below = [n for n in divisors if n < world_size][-1:]
            near = below + [n for n in divisors if n > world_size][:1]
            multiple = -(-virtual_shards // world_size) * world_size
            return (
                f"strategy {strategy!r} splits every step into train.virtual_shards = "
                f"{virtual_shards} parts, which {world_size} processes cannot share evenly; use "
                f"{' or '.join(map(str, near))} processes, or --set "
                f"train.virtual_shards={multiple} (which is another training)"
            )
    return None


def _from_entry_points(kind: str) -> dict[str, str]:
    group = ENTRY_POINT_GROUPS.get(kind)
    if group is None:
        return {}
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}
