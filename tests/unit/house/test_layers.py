"""Imports run downwards only, and the two planes stay apart."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from support import ROOT

SRC = ROOT / "src"

# From the ground up. A module may import from its own layer's package and from layers below.
LAYERS: list[tuple[str, ...]] = [
    ("dtrain.errors", "dtrain.procs", "dtrain.plainjson", "dtrain.checked"),
    ("dtrain.run.files",),
    (
        "dtrain.run.rundir",
        "dtrain.run.ids",
        "dtrain.ranks",
        "dtrain.task",
        "dtrain.callback",
        "dtrain.catalog",
        "dtrain.ports",
        "dtrain.nodelist",
    ),
    ("dtrain.run.attempts", "dtrain.run.manifest"),
    (
        "dtrain.assets",
        "dtrain.trace",
        "dtrain.run.flight_recorder",
        "dtrain.run.backend_files",
        "dtrain.run.remote",
        "dtrain.environ",
    ),
    ("dtrain.job",),
    (
        "dtrain.plan",
        "dtrain.run.snapshot",
        "dtrain.run.failures",
        "dtrain.node.channel",
        "dtrain.node.memory",
        "dtrain.run.token",
        "dtrain.run.spill",
        "dtrain.node.lost",
    ),
    ("dtrain.run.verdict", "dtrain.console", "dtrain.node.gpus", "dtrain.train"),
    ("dtrain.launchers", "dtrain.node", "dtrain.keras"),
    ("dtrain.verify", "dtrain.export"),
    ("dtrain.worker", "dtrain.cli", "dtrain.testing"),
    ("dtrain.__main__",),
]

LAUNCH_PLANE = (
    "dtrain.errors",
    "dtrain.procs",
    "dtrain.plainjson",
    "dtrain.run.files",
    "dtrain.run.rundir",
    "dtrain.run.attempts",
    "dtrain.run.manifest",
    "dtrain.run.ids",
    "dtrain.run.backend_files",
    "dtrain.run.remote",
    "dtrain.ranks",
    "dtrain.task",
    "dtrain.callback",
    "dtrain.catalog",
    "dtrain.ports",
    "dtrain.nodelist",
    "dtrain.assets",
    "dtrain.environ",
    "dtrain.job",
    "dtrain.plan",
    "dtrain.node.gpus",
    "dtrain.run.snapshot",
    "dtrain.run.failures",
    "dtrain.node.channel",
    "dtrain.node.memory",
    "dtrain.run.token",
    "dtrain.checked",
    "dtrain.run.spill",
    "dtrain.node.lost",
    "dtrain.run.verdict",
    "dtrain.console",
    "dtrain.launchers",
    "dtrain.trace",
    "dtrain.run.flight_recorder",
    "dtrain.verify",
    "dtrain.cli",
)
_IN_DRIVER = ("driver", "jobs", "nodes", "placing", "watch")
RAY_DRIVER = tuple(f"dtrain.launchers.ray_{part}" for part in _IN_DRIVER)
HEAVY = {"torch", "ray", "lightning", "pytorch_lightning", "keras", "submitit"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


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
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


MODULES = modules()


def layer_of(module: str) -> int:
    best = max(
        (prefix for layer in LAYERS for prefix in layer if is_in(module, prefix)),
        key=len,
        default=None,
    )
    assert best is not None, f"{module} stands in no layer: add it to LAYERS"
    return next(index for index, layer in enumerate(LAYERS) if best in layer)


def is_in(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def ours(path: Path, module: str) -> set[str]:
    return {name for name in imports(path) if name in MODULES and name != module}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dtrain"])
def test_imports_run_downwards(module: str) -> None:
    package = module.split(".")[1]
    for imported in ours(MODULES[module], module):
        if imported in ("dtrain", "dtrain.node") or imported.split(".")[1] == package:
            continue
        assert layer_of(imported) < layer_of(module), f"{module} imports {imported} above it"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if any(is_in(m, prefix) for prefix in LAUNCH_PLANE)]
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
        inside = ("dtrain.task", "dtrain.launchers.slurm.submitit", *RAY_DRIVER)
        assert not heavy or current in inside, f"{module} reaches {heavy} through {current}"
        todo += [name for name in found if name in MODULES]


@pytest.mark.parametrize("module", [m for m in MODULES if is_in(m, "dtrain.train")])
def test_training_plane_never_imports_launchers(module: str) -> None:
    forbidden = ("dtrain.launchers", "dtrain.cli", "dtrain.plan", "dtrain.console")
    for imported in ours(MODULES[module], module):
        assert not any(is_in(imported, prefix) for prefix in forbidden), imported
