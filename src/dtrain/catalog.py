"""What exists: launchers, strategies, trainers, loggers, and which of them go together.

Facts only, no imports of what they name: the launch plane reads this without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dtrain.errors import PlanError


@dataclass(frozen=True)
class LauncherFact:
    target: str
    """`module:Class`, imported when used."""
    summary: str
    extra: str | None = None
    """The pip extra it needs, if any."""
    allocates: bool = False
    """Nodes come with the cores that the job asks for, whatever this host has."""
    simulates: bool = False
    """All nodes are on this host."""
    urls: bool = False
    """Whether runs may be kept at a URL, by nodes that share no disk."""


@dataclass(frozen=True)
class StrategyFact:
    """A way in which the processes share the work."""

    target: str
    summary: str
    one_process: bool = False
    """One process in all (`single`) or one per node (`dp`), whatever --procs says."""
    multi_node: bool = True
    virtual_shards: bool = False
    """Deals `train.virtual_shards` evenly: the number of processes must divide it."""


@dataclass(frozen=True)
class TrainerFact:
    target: str
    summary: str
    strategies: tuple[str, ...]
    extra: str | None = None
    module: str | None = None
    """What that extra brings, by the name that is imported."""


@dataclass(frozen=True)
class FrameworkFact:
    """A library whose own models a job may name as its task."""

    target: str
    """What makes tasks of them, a `dtrain.train.load.Adapter`."""
    job_check: str
    """What reads a job before a launch, a `dtrain.job.frameworks.JobCheck`."""


LIGHTNING = ("pytorch_lightning", "lightning")
"""The packages that Lightning comes in, by the names that are imported."""

SCRIPT = "script"
"""The trainer of a job that has a script instead of a task."""
OWN = "own"
"""Stands for the strategy of a script: whatever it does by itself."""


@dataclass(frozen=True)
class LoggerFact:
    target: str
    summary: str
    module: str | None = None
    """The package it needs, as it is imported; None for none."""
    extra: str | None = None


LAUNCHERS: Mapping[str, LauncherFact] = {
    "local": LauncherFact(
        "dtrain.launchers.local:LocalLauncher",
        "this machine, as one node or several simulated",
        simulates=True,
        urls=True,
    ),
    "torchrun": LauncherFact(
        "dtrain.launchers.torchrun:TorchrunLauncher",
        "this host is one node of the job; run the command on each host",
    ),
    "slurm": LauncherFact(
        "dtrain.launchers.slurm.launcher:SlurmLauncher",
        "one batch job of a Slurm cluster, with one node agent per node",
        extra="slurm",
        allocates=True,
    ),
    "ray": LauncherFact(
        "dtrain.launchers.ray.launcher:RayLauncher",
        "the nodes of a Ray cluster, one running or one of our own",
        extra="ray",
        allocates=True,
        urls=True,
    ),
}

STRATEGIES: Mapping[str, StrategyFact] = {
    "single": StrategyFact(
        "dtrain.train.strategies.base:SingleStrategy",
        "one process, the reference for all others",
        one_process=True,
        multi_node=False,
    ),
    "dp": StrategyFact(
        "dtrain.train.strategies.dp:DataParallelStrategy",
        "nn.DataParallel: one process, one replica per device",
        one_process=True,
        multi_node=False,
    ),
    "ddp": StrategyFact(
        "dtrain.train.strategies.ddp:DDPStrategy",
        "DistributedDataParallel: one process per device, gradients all-reduced",
    ),
    "fsdp": StrategyFact(
        "dtrain.train.strategies.fsdp:FSDPStrategy",
        "FSDP2 fully_shard: parameters, gradients and optimizer state cut over the processes",
    ),
    "exact": StrategyFact(
        "dtrain.train.strategies.exact.strategy:ExactStrategy",
        "virtual shards added up in one fixed tree: the same bits on any number of processes",
        virtual_shards=True,
    ),
}

TRAINERS: Mapping[str, TrainerFact] = {
    "native": TrainerFact(
        "dtrain.train.loop.native:NativeTrainer",
        "dtrain's own loop",
        strategies=("single", "dp", "ddp", "fsdp", "exact"),
    ),
    "lightning": TrainerFact(
        "dtrain.integrations.lightning.adapter:make_trainer",
        "Lightning's loop, hooks, callbacks and loggers, for a task or a LightningModule",
        strategies=("single", "ddp", "fsdp", "exact"),
        extra="lightning",
        module=LIGHTNING[0],
    ),
    SCRIPT: TrainerFact(
        "dtrain.integrations.script.run:run_script",
        "a Python file as it is, with its own loop, as under torchrun",
        strategies=(),
    ),
}


FRAMEWORKS: Mapping[str, FrameworkFact] = {
    "lightning": FrameworkFact(
        "dtrain.integrations.lightning.adapter:LightningAdapter",
        "dtrain.integrations.lightning.job_check:LightningCheck",
    ),
    "keras": FrameworkFact(
        "dtrain.integrations.keras.adapter:KerasAdapter",
        "dtrain.integrations.keras.job_check:KerasCheck",
    ),
}


@dataclass(frozen=True)
class ExportFact:
    """A form in which a trained model is written."""

    suffix: str
    modules: tuple[str, ...] = ()
    """The packages it needs, as they are imported."""
    extra: str | None = None


EXPORTS: Mapping[str, ExportFact] = {
    "safetensors": ExportFact(".safetensors", ("safetensors",), "export"),
    "torch-export": ExportFact(".pt2"),
    "onnx": ExportFact(".onnx", ("onnx", "onnxscript", "onnxruntime"), "export"),
    "keras": ExportFact(".keras", ("keras",), "keras"),
}

_LOGGERS = "dtrain.train.metrics.loggers"

LOGGERS: Mapping[str, LoggerFact] = {
    "csv": LoggerFact(f"{_LOGGERS}:Csv", "train.csv and eval.csv in the run's folder"),
    "tensorboard": LoggerFact(
        f"{_LOGGERS}:TensorBoard",
        "event files in the run's folder",
        module="tensorboard",
        extra="loggers",
    ),
    "mlflow": LoggerFact(
        f"{_LOGGERS}:MLflow", "a tracking server, or a folder", module="mlflow", extra="mlflow"
    ),
    "wandb": LoggerFact(f"{_LOGGERS}:Wandb", "Weights & Biases", module="wandb", extra="wandb"),
    "comet": LoggerFact(f"{_LOGGERS}:Comet", "Comet", module="comet_ml", extra="comet"),
}


@dataclass(frozen=True)
class PlacementFact:
    """A reader that tells a node process who it is."""

    target: str


PLACEMENTS: Mapping[str, PlacementFact] = {
    "argv": PlacementFact("dtrain.node.placement.argv:ArgvPlacement"),
    "slurm": PlacementFact("dtrain.node.placement.slurm:SlurmPlacement"),
    "ray": PlacementFact("dtrain.node.placement.ray:RayPlacement"),
}

_TABLES: Mapping[str, Mapping[str, Any]] = {
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
    """The `module:Class` behind a name, from the tables above or from an entry point.

    Args:
        kind: `launcher`, `strategy`, `trainer`, `framework`, `logger` or `placement`.
        name: as written in job.yaml; a placement's as the launcher says it.

    Raises:
        PlanError: nothing of that kind has this name.
    """
    table: Mapping[str, Any] = _TABLES[kind]
    if name in table:
        return str(table[name].target)
    outside = _outside(kind)
    if name in outside:
        return outside[name]
    raise PlanError(f"unknown {kind} {name!r}; known: {', '.join(names(kind))}")


def names(kind: str) -> list[str]:
    return [*_TABLES[kind], *(name for name in _outside(kind) if name not in _TABLES[kind])]


def load(kind: str, name: str) -> Any:
    return imported(find(kind, name))


def imported(target: str) -> Any:
    """Import and return what `module:Class` names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def launcher(name: str) -> LauncherFact:
    """What is known of a launcher; of one from an entry point, only where it is."""
    return LAUNCHERS.get(name) or LauncherFact(find("launcher", name), "")


def export_problem(name: str) -> str | None:
    """What an export lacks here, with its pip command; None when nothing. Imports nothing."""
    fact = EXPORTS[name]
    missing = [module for module in fact.modules if find_spec(module) is None]
    if not missing:
        return None
    return f"--to {name} needs {' and '.join(missing)}: pip install 'dtrain[{fact.extra}]'"


def logger_problem(name: str) -> str | None:
    """Why a logger cannot be used with this Python; None when it can. Imports nothing."""
    fact = LOGGERS.get(name)
    if fact is None or fact.module is None or find_spec(fact.module) is not None:
        return None
    return f"logger {name!r} needs {fact.module}: pip install 'dtrain[{fact.extra}]'"


def trainer_problem(name: str) -> str | None:
    """Why a trainer cannot be used with this Python; None when it can. Imports nothing."""
    fact = TRAINERS.get(name)
    if fact is None or fact.module is None or find_spec(fact.module) is not None:
        return None
    return f"trainer {name!r} needs a package: pip install 'dtrain[{fact.extra}]'"


def url_problem(launcher: str) -> str | None:
    """Why runs by a launcher cannot be kept at a URL; None when they can."""
    fact = LAUNCHERS.get(launcher)
    if fact is None or fact.urls:
        return None
    able = " and ".join(repr(name) for name, each in LAUNCHERS.items() if each.urls)
    return (
        f"launcher {launcher!r} needs a folder for --runs, one that all nodes share; "
        f"launchers {able} take a URL"
    )


def pair_problem(trainer: str, strategy: str, nodes: int) -> str | None:
    """Why a trainer, a strategy and a node count do not go together; None when they do.

    The sentence names the nearest combination that works.
    """
    if trainer == SCRIPT:
        return None if strategy == OWN else _NO_STRATEGY.format(strategy)
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


_NO_STRATEGY = (
    "a script shares its work by itself and has no strategy {0!r}: leave the strategy out, or "
    "write the training as a task, which trainer 'native' trains under any"
)


def shard_problem(strategy: str, virtual_shards: int, world_sizes: Iterable[int]) -> str | None:
    """Why a number of processes cannot share the virtual shards evenly; None when all can.

    Args:
        strategy: by name; most have no virtual shards.
        virtual_shards: `train.virtual_shards`.
        world_sizes: every number of processes that the launch may come to.
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
                f"strategy {strategy!r} cuts every step into train.virtual_shards = "
                f"{virtual_shards} parts, which {world_size} processes cannot share evenly; use "
                f"{' or '.join(map(str, near))} processes, or --set "
                f"train.virtual_shards={multiple} (which is another training)"
            )
    return None


def _outside(kind: str) -> dict[str, str]:
    group = ENTRY_POINT_GROUPS.get(kind)
    if group is None:
        return {}
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}
