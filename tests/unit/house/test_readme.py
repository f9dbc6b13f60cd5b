"""README and docs: nothing stale, no broken link, only jobs that load."""

from __future__ import annotations

import functools
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from dtrain import catalog
from dtrain.job.spec import JobSpec, ProfileSpec
from support import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def filler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dtrain_docs_fill", ROOT / "docs" / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/doctor.md",
        "docs/errors.md",
        "docs/extending.md",
        "docs/job-file.md",
        "docs/same-training.md",
    ],
)
def test_what_stands_elsewhere_too_is_the_same(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "<!-- begin " in text
    assert filler().filled(text) == text, "stale: run `python docs/fill.py`"


def test_the_example_is_the_files() -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("job.yaml", "task.py"):
        assert (ROOT / "examples" / "digits" / name).read_text() in text


def test_the_matrix_tells_the_catalog() -> None:
    text = filler().matrix()
    for table in (catalog.TRAINERS, catalog.LAUNCHERS, catalog.STRATEGIES):
        assert all(f"`{name}`" in text for name in table)
    rows = [[c.replace("`", "").strip() for c in row.split("|")[1:-1]] for row in text.splitlines()]
    head, body = rows[0], rows[2:]
    for trainer, _, *cells in body:
        for strategy, works in zip(head[2:], cells, strict=True):
            if trainer == "script":
                assert works == "its own"
                continue
            nodes = {"no": 0, "one node": 1, "yes": 2}[works]
            for size in (1, 2):
                problem = functools.partial(catalog.pair_problem, trainer)
                if trainer == "lightning, own loops":
                    problem = catalog.own_loops_problem
                fits = problem(strategy, size) is None
                assert fits == (size <= nodes), (trainer, strategy, size)


def test_every_extra_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert set(project["optional-dependencies"]) <= told


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_named_in_the_text_exist(path: Path) -> None:
    folders = "src|tests|docs|examples|launchers|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", path.read_text())
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_yaml_and_python_are_what_they_seem(path: Path) -> None:
    for language, text in FENCE.findall(path.read_text()):
        if language == "python":
            compile(text, name_of(path), "exec")
        elif language == "yaml":
            value = yaml.safe_load(text)
            model = ProfileSpec if "launcher" in value else JobSpec
            model.model_validate(value)


def test_the_map_shows_what_is_there() -> None:
    """Every place of the house exists, or is marked as not yet built."""
    text = (ROOT / "docs" / "design.md").read_text()
    (tree,) = [body for _, body in FENCE.findall(text) if "src/dtrain/launch_plan.py" in body]
    for line in tree.splitlines():
        place = ROOT / line.split()[0]
        there = place.is_file() or (place.is_dir() and any(place.iterdir()))
        assert there != ("not yet" in line), line
    packages = {path.parent.name for path in (ROOT / "src" / "dtrain").glob("*/__init__.py")}
    assert not {name for name in packages if f"src/dtrain/{name}/" not in tree}
