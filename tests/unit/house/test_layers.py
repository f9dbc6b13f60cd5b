"""Imports run downwards only, also inside packages, and the two planes stay apart."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from support import ROOT

SRC = ROOT / "src"

# For each package its parts (modules and packages in it), from the ground up: a part imports only
# from rows below its own. So no two parts import each other, whatever the way round.
LAYERS: dict[str, tuple[str, ...]] = {
    "dtrain": (
        "assets callback cgroups checked codes errors plainjson procs ranks task waiting words",
        "__init__ catalog environ forking memory ports run",
        "job testing trace",
        "launch_plan train",
        "doctor",
        "console export integrations page",
        "keras node",
        "launchers worker",
        "checkpoints driving planning searching",
        "bench cleaning comparing diagnosing initializing resuming top verification",
        "sweeping",
        "report",
        "api cli",
        "__main__",
    ),
    "dtrain.api": (
        "arguments cells metrics",
        "run task_class",
        "launching",
    ),
    "dtrain.bench": ("results", "session text"),
    "dtrain.checkpoints": (
        "elements lookup torch_file",
        "contents exporting listing pinning verifying",
        "differences pruning",
    ),
    "dtrain.cleaning": (
        "claim leftovers",
        "finding",
        "removing",
    ),
    "dtrain.cli": (
        "completers lazy torchrun",
        "main options",
        "bench checkpoint compare completion doctor export init launchers logs plan report schema "
        "top",
        "clean runs",
        "sweep",
        "cancel launch status",
        "resume verify why",
    ),
    "dtrain.cli.checkpoint": (
        "export group pin prune table unpin verify",
        "diff listing show",
    ),
    "dtrain.codes": ("entry", "launch training", "__init__"),
    "dtrain.comparing": ("code losses", "compare text"),
    "dtrain.console": (
        "fold history notebook out silent tail",
        "live",
    ),
    "dtrain.doctor": (
        "asked diagnosis",
        "network versions",
        "compared gpus",
        "host",
        "checks explained",
    ),
    "dtrain.export": (
        "model",
        "formats",
        "run",
        "__main__",
    ),
    "dtrain.initializing": (
        "existing place shell",
        "launch_line lightning_script proposal",
        "script_file writing",
        "reading",
    ),
    "dtrain.integrations": ("keras lightning script",),
    "dtrain.integrations.keras": (
        "data job_check metrics optimizer train_step variables",
        "callbacks",
        "task",
        "compiled_model",
        "adapter",
    ),
    "dtrain.integrations.lightning": (
        "job_check optimizers package step_loader",
        "compat",
        "callbacks environment needs_loops reductions",
        "logging user_loaders",
        "state",
        "module",
        "loops trainer",
        "choice",
        "adapter",
    ),
    "dtrain.integrations.lightning.loops": (
        "placement strategy trainer_arguments",
        "reading state",
        "fit",
        "trainer",
    ),
    "dtrain.integrations.script": (
        "accelerate sampler step_count stopping",
        "checkpoint command run",
    ),
    "dtrain.job": (
        "located model static_source units",
        "faults frameworks yaml_reader",
        "accelerate fields script static_check",
        "spec",
        "errors imports references schema",
        "launcher_options",
        "load",
        "profile",
    ),
    "dtrain.launchers": (
        "base flags prepare torchrun_options warm",
        "local",
        "listing status stopping torchrun",
        "summary supervise",
        "driver ray slurm",
    ),
    "dtrain.launchers.ray": (
        "actor job_output local_cluster options",
        "package placement",
        "attempt",
        "driver",
        "job",
        "cluster",
        "launcher",
    ),
    "dtrain.launchers.slurm": (
        "options queue templates",
        "outcome partitions script",
        "sbatch",
        "cluster submitit",
        "launcher",
    ),
    "dtrain.node": (
        "early_exit environment hashing hints placement sealed stack_dump",
        "heartbeat silence store usage worker",
        "fork_server rendezvous",
        "preflight",
        "agent",
        "agent_process",
        "__main__",
        "warm",
    ),
    "dtrain.node.placement": (
        "base",
        "argv ray slurm",
    ),
    "dtrain.page": ("chart document",),
    "dtrain.report": (
        "phase_grid timeline",
        "history",
        "page",
    ),
    "dtrain.run": (
        "files flight_recorder ids progress_bars rundir",
        "attempts backend_files events failures manifest phases progress step_profile sync",
        "remote snapshot verdict",
        "code_archive lookup",
    ),
    "dtrain.run.remote": (
        "chunks",
        "store",
        "checkpoints mirror rank_files",
        "runs",
    ),
    "dtrain.searching": (
        "index",
        "fields",
        "query",
    ),
    "dtrain.sweeping": (
        "sweep values work",
        "array cancelling making queue",
        "drive",
    ),
    "dtrain.testing": (
        "wire",
        "body",
        "report watch",
        "server",
        "client",
        "calls leaks",
        "__init__ plugin",
    ),
    "dtrain.top": ("keys watch", "view"),
    "dtrain.train": (
        "context digest importing logs packed precision seeding sums vote",
        "collectives load metrics",
        "checkpoint doctor",
        "contract ema weights",
        "data loss",
        "tracing",
        "checks",
        "faults strategies",
        "loop",
        "bench",
    ),
    "dtrain.train.checkpoint": (
        "blocks leaves retention",
        "files headers tree",
        "proof",
        "parts",
        "content directory state",
        "writer_process",
        "writer",
        "store",
    ),
    "dtrain.train.checks": (
        "collective_trace train_state",
        "notices replicas spoilt unexpected_change",
        "api finite initial_state",
        "checks",
    ),
    "dtrain.train.data": (
        "content hashing loader_process overlap placement rng_state",
        "mismatch permutation shared_files",
        "augmentation checksum order",
        "__init__ exactly_once fetch",
        "loader samples stream",
        "out_of_step pipeline",
        "iterable_pipeline",
        "sharded_pipeline",
    ),
    "dtrain.train.loop": (
        "added_groups grace metric_callbacks predictions progress step task_state",
        "callbacks evaluation reporting settings",
        "build checkpointing",
        "training",
        "native",
    ),
    "dtrain.train.metrics": (
        "events loggers profiler",
        "phases writer",
    ),
    "dtrain.train.strategies": (
        "base fsdp_wrapping lent parameters",
        "ddp dp exact forwards fsdp_gathers",
        "fsdp_sharded",
        "fsdp",
    ),
    "dtrain.train.strategies.exact": (
        "buffers flat_buffer tree",
        "exchange shards",
        "strategy",
    ),
    "dtrain.train.weights": (
        "formats matching",
        "source",
        "initial",
    ),
    "dtrain.train.tracing": (
        "attributes digest noise perturb",
        "tracer",
    ),
    "dtrain.verification": (
        "compare layouts rules warm_servers",
        "case lengths runner samples",
        "findings losses",
        "causes",
        "judge",
        "report",
        "session",
        "text",
        "html",
    ),
}

TO_MEND: set[tuple[str, str]] = {}
"""Pairs of a module and one above it that it imports."""

TRAINING_PLANE = ("dtrain.train", "dtrain.integrations")
LAUNCH_PLANE = tuple(
    f"dtrain.{part}"
    for row in (
        "errors procs plainjson checked environ waiting forking ports assets ranks task callback",
        "words catalog run job plan planning resuming trace console launchers verify api cli",
        "bench checkpoints cgroups cleaning comparing diagnosing doctor searching page report top",
        "initializing",
    )
    for part in row.split()
)
TORCH_FILE = "dtrain.checkpoints.torch_file"
_IN_DRIVER = ("driver", "job", "attempt", "placement", "cluster")
RAY_DRIVER = tuple(f"dtrain.launchers.ray.{part}" for part in _IN_DRIVER)
HEAVY = {"torch", "ray", "lightning", "pytorch_lightning", "keras", "submitit"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py"]


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, in functions too, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return frozenset(found)


def is_in(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def ours(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name in MODULES and name != module}


def rank(package: str, module: str) -> int:
    """The row of a package's table in which the part stands that a module is, or is in."""
    part = module.removeprefix(package).lstrip(".").partition(".")[0] or "__init__"
    rows = [index for index, row in enumerate(LAYERS[package]) if part in row.split()]
    assert len(rows) == 1, f"{part} is in {len(rows)} rows of LAYERS[{package!r}], not in one"
    return rows[0]


def common(one: str, other: str) -> str:
    """The innermost package that two modules are both in."""
    inside = [name for name in PACKAGES if is_in(one, name) and is_in(other, name)]
    return max(inside, key=len)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_table_names_what_is_there(package: str) -> None:
    parts = {
        name.removeprefix(package + ".").partition(".")[0]
        for name in MODULES
        if name.startswith(package + ".")
    }
    table = {part for row in LAYERS[package] for part in row.split()}
    assert table - {"__init__"} == parts


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    for imported in ours(module):
        package = common(module, imported)
        downwards = imported == package or rank(package, imported) < rank(package, module)
        is_known = (module, imported) in TO_MEND
        assert downwards != is_known, f"{module} imports {imported}, which is not below it"


WRITER = "dtrain.train.checkpoint.writer_process"
"""A process beside each rank, which starts in a tenth of a second without torch."""


@pytest.mark.parametrize(
    "module", [WRITER, *(m for m in MODULES if any(is_in(m, prefix) for prefix in LAUNCH_PLANE))]
)
def test_launch_plane_never_imports_torch(module: str) -> None:
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        found = imports(MODULES[current])
        heavy = {name.split(".")[0] for name in found} & HEAVY
        # task.collate is called by workers only, the next by who says `submit: submitit`; both
        # imports stand inside, as that of Ray jobs does. The driver of launcher `ray` is a process
        # of its own.
        # `checkpoints.torch_file` is a process of its own too.
        inside = ("dtrain.task", "dtrain.launchers.slurm.submitit", *RAY_DRIVER, TORCH_FILE)
        assert not heavy or current in inside, f"{module} reaches {heavy} through {current}"
        todo += [name for name in found if name in MODULES]


@pytest.mark.parametrize(
    "module", [m for m in MODULES if any(is_in(m, prefix) for prefix in TRAINING_PLANE)]
)
def test_training_plane_never_imports_launchers(module: str) -> None:
    forbidden = ("dtrain.launchers", "dtrain.cli", "dtrain.launch_plan", "dtrain.console")
    for imported in ours(module):
        assert not any(is_in(imported, prefix) for prefix in forbidden), imported
