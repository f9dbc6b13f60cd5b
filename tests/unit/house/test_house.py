"""The house keeps its own rules."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from importlib.metadata import version

import dtrain
from support import ROOT


def test_every_test_file_is_collected(request) -> None:  # type: ignore[no-untyped-def]
    """pytest passes over directories named `dist` unless told otherwise."""
    recursed = request.config.getini("norecursedirs")
    for path in (ROOT / "tests").rglob("test_*.py"):
        kind, *folders = path.relative_to(ROOT / "tests").parts[:-1]
        assert kind in {"unit", "dist", "gpu", "cluster"}, path
        assert not {kind, *folders} & set(recursed), path


def test_no_two_test_files_have_the_same_name() -> None:
    """A rank that imports a test's function by the name of its module would get the other's."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert project == dtrain.__version__ == version("dtrain")
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project
    (newest, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == project


def test_public_names() -> None:
    assert dtrain.__all__ == [
        "EMA",
        "Callback",
        "Loss",
        "Run",
        "Task",
        "check",
        "checkpoint",
        "launch",
        "plan",
        "rank",
        "resume",
        "runs",
        "sampler",
        "stopping",
        "sweep",
        "verify",
        "world_size",
    ]
