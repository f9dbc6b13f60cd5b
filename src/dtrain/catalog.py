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
class Needs:
    """Packages without which something cannot be used."""

    modules: tuple[str, ...] = ()
    """By the names that are imported."""
    extra: str = ""
    """The pip extra that brings them."""

    def problem(self, what: str) -> str | None:
        """What is missing here, with its pip command; None when nothing. Imports nothing."""
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
    """Nodes come with the cores that the job asks for, whatever this host has."""
    simulates: bool = False
    """All nodes are on this host."""
    urls: bool = False
    """Whether runs may be kept at a URL, by nodes that share no disk."""


@dataclass(frozen=True)
class StrategyFact(Fact):
    """A way in which the processes share the work."""

    summary: str = ""
    one_process: bool = False
    """One process in all (`single`) or one per node (`dp`), whatever --procs says."""
    multi_node: bool = True
    virtual_shards: bool = False
    """Deals `train.virtual_shards` evenly: the number of processes must divide it."""


@dataclass(frozen=True)
class TrainerFact(Fact):
    strategies: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameworkFact(Fact):
    """A library whose own models a job may name as its task; the target is a `load.Adapter`."""

    job_check: str = ""
    """What reads a job before a launch, a `dtrain.job.frameworks.JobCheck`."""


@dataclass(frozen=True)
class ExportFact:
    """A form in which a trained model is written."""

    suffix: str
    needs: Needs = NOTHING


LIGHTNING = ("pytorch_lightning", "lightning")
"""The packages that Lightning comes in, by the names that are imported."""

OWN_LOOPS = ("single", "ddp", "fsdp")
"""The strategies of Lightning's own loops, `lightning.step: lightning`."""

SCRIPT = "script"
"""The trainer of a job that has a script instead of a task."""
OWN = "own"
"""Stands for the strategy of a script: whatever it does by itself."""

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
    ),
    "fsdp": StrategyFact(
        f"{_STRATEGIES}.fsdp:FSDPStrategy",
        summary="FSDP2 fully_shard: parameters, gradients and optimizer state cut over the "
        "processes",
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
    """The `module:Class` behind a name, from the tables above or from an entry point.

    Args:
        kind: `launcher`, `strategy`, `trainer`, `framework`, `logger` or `placement`.
        name: as written in job.yaml; a placement's as the launcher says it.

    Raises:
        PlanError: nothing of that kind has this name.
    """
    table = _TABLES[kind]
    if name in table:
        return table[name].target
    outside = _outside(kind)
    if name in outside:
        return outside[name]
    raise PlanError(
        f"unknown {kind} {name!r}; known: {', '.join(names(kind))}", code="plan.unknown-name"
    )


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
    return LAUNCHERS.get(name) or LauncherFact(find("launcher", name))


def problem_of(kind: str, name: str) -> str | None:
    """What a launcher, trainer or logger lacks here, with its pip command; None when nothing."""
    fact: Fact | None = _TABLES[kind].get(name)
    return None if fact is None else fact.needs.problem(f"{kind} {name!r}")


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
    if trainer == SCRIPT and strategy != OWN:
        return (
            f"a script sets up DDP or FSDP by itself, so strategy {strategy!r} does not apply: "
            "leave the strategy out, or write the training as a task, which trainer 'native' "
            "trains under any"
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
    """Why Lightning's own loops cannot train under a strategy; None when they can."""
    if strategy in STRATEGIES and strategy not in OWN_LOOPS:
        return (
            f"Lightning's own loops have no strategy {strategy!r} here; they have: "
            f"{', '.join(OWN_LOOPS)}"
        )
    return pair_problem("lightning", strategy, nodes)


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
