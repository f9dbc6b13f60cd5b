"""A class of a notebook's cells becomes a file that holds all that it needs, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dtrain.api import cells
from dtrain.errors import LaunchError, UsageError
from support.errors import raises

NOTEBOOK = "notebook_under_test"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run cells in IPython's shell; gives the names that the notebook has then."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    module = ModuleType(NOTEBOOK)
    monkeypatch.setitem(sys.modules, NOTEBOOK, module)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config, user_module=module, user_ns=vars(module))

    def run_cells(*texts: str) -> dict[str, Any]:
        for text in texts:
            shell.run_cell(text, store_history=True)
        return vars(module)

    hooks = sys.excepthook, sys.displayhook
    yield run_cells
    sys.excepthook, sys.displayhook = hooks


def imported(task: Any) -> ModuleType:
    """The file of a class, as a worker imports it."""
    path = cells.write(task)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_class_needs_comes_with_it(run: Run) -> None:
    names = run(
        "import math, json\nfrom os import path as where\nimport xml.dom as dom",
        "import collections.abc",
        "SIZES = {'a': [1, 2.5, None], 'b': (True,)}\nunused = object()",
        "def twice(x):\n    return helper(x) * 2",
        "def helper(x):\n    return math.floor(x)",
        "class Base:\n    def who(self): return where.join(dom.__name__, 'x')",
        "class Task(Base):\n"
        "    table = [k for k in SIZES]\n"
        "    def both(self, keys: collections.abc.Sequence = ()):\n"
        "        return twice(2.5), self.table, SIZES",
    )
    module = imported(names["Task"])
    task = module.Task()
    assert task.both() == (4, ["a", "b"], {"a": [1, 2.5, None], "b": (True,)})
    assert task.who() == "xml.dom/x"
    assert not {"unused", "json"} & vars(module).keys()


def test_the_lines_are_those_of_the_cell(run: Run) -> None:
    text = "class Task:\n    # a comment\n    x   =  1  # odd spaces\n\n    def f(self): return 'ü'"
    assert text in cells.source_of(run(text)["Task"])


def test_what_is_needed_at_once_comes_first(run: Run) -> None:
    names = run(
        "class Late:\n    def make(self): return Task",
        "def register(kind):\n    SEEN.append(kind.__name__)\n    return kind",
        "SEEN = []",
        "@register\nclass Task(Late):\n    pass",
    )
    names["SEEN"].clear()
    module = imported(names["Task"])
    assert module.Task().make() is module.Task
    assert module.SEEN == ["Task"]
    assert imported(names["Late"]).Late().make().__name__ == "Task"


def test_the_newest_definition_counts_and_a_cell_that_failed_does_not(run: Run) -> None:
    first = "class Task:\n    def version(self): return 1"
    names = run(first, first.replace("1", "2"), f"raise ValueError\n{first.replace('1', '3')}")
    assert imported(names["Task"]).Task().version() == 2
    old = cells.write(names["Task"])
    names = run(first.replace("1", "4"))
    assert cells.write(names["Task"]) != old
    assert old.exists()


def test_decorated_functions_and_other_names(run: Run) -> None:
    names = run(
        "import functools\n@functools.cache\ndef cached(x):\n    return x + 1",
        "def plus(f):\n    def inner(x):\n        return f(x) + 10\n    return inner",
        "@plus\ndef plain(x):\n    return x",
        "Alias = int\ndef own(x):\n    return x\nother = own",
        "class Task:\n    def f(self):\n        return cached(1), plain(1), Alias('3'), other(4)",
    )
    assert imported(names["Task"]).Task().f() == (2, 11, 3, 4)


def test_types_of_annotations(run: Run) -> None:
    names = run(
        "Pairs = list[tuple[int, 'Later']]\nMaybe = int | None",
        "class Task:\n    def f(self, pairs: Pairs, number: Maybe = None): return number",
    )
    assert imported(names["Task"]).Task.f.__annotations__["pairs"] == names["Pairs"]
    names = run(
        "from __future__ import annotations",
        "class Task:\n    def f(self, x: NotThere): return x",
    )
    assert imported(names["Task"]).Task().f(1) == 1


def test_a_class_without_methods(run: Run) -> None:
    names = run(
        "from dataclasses import dataclass",
        "@dataclass\nclass Point:\n    x: int = 3",
        "class Task:\n    def f(self): return Point().x",
    )
    assert imported(names["Task"]).Task().f() == 3


def test_stars_and_names_that_a_cell_took_from_elsewhere(run: Run) -> None:
    names = run(
        "from math import *\nimport os as system\nfloor = __import__('math').floor",
        "class Task:\n    def f(self): return floor(2.5), system.sep, sqrt(4)",
    )
    assert imported(names["Task"]).Task().f() == (2, "/", 2.0)


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ("data = object()", "an object"),
        ("import torch\ndata = torch.ones(2)", "a Tensor"),
        ("data = open('x.txt', 'w')", "a TextIOWrapper"),
        ("data = float('nan')", "a float"),
        ("data = {1: object()}", "a dict"),
        ("class D(dict): pass\ndata = D()", "a D"),
    ],
)
def test_what_a_file_cannot_have_is_named(made: str, kind: str, run: Run) -> None:
    names = run(made, "class Task:\n    def f(self): return data")
    with raises("api.class-needs-notebook", "Task", "'data'", f" {kind},", kind=UsageError):
        cells.source_of(names["Task"])
    getattr(names["data"], "close", lambda: None)()


def test_a_helper_of_a_helper_is_named_too(run: Run) -> None:
    names = run(
        "data = object()\ndef helper(): return data",
        "class Task:\n    def f(self): return helper()",
    )
    with raises("api.class-needs-notebook", "helper", "'data'", kind=UsageError):
        cells.source_of(names["Task"])


def test_made_by_exec(run: Run) -> None:
    names = run("exec('class Task:\\n    def f(self): return 1')")
    assert not cells.is_from_cell(names["Task"])
    names = run("exec('def made(): return 1')", "class Other:\n    def f(self): return made()")
    with raises("api.class-without-source", "'made'", kind=UsageError):
        cells.source_of(names["Other"])


def test_a_directory_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    names = run("class Task: pass")
    (tmp_path / cells.FOLDER).write_text("a file in its place")
    with raises("file.not-writable", f"{tmp_path}/{cells.FOLDER}/task_", kind=LaunchError):
        cells.write(names["Task"])
