"""From `task:` in job.yaml to the user's object, and the errors when there is none."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain import Task, catalog
from dtrain.errors import JobError
from dtrain.train.load import load_task
from support.errors import raises

METHODS = """
  def model(self): return "model"
  def train_dataset(self): return [1]
  def loss(self, model, batch): return batch
  def optimizer(self, model): return "optimizer"
"""


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.parent


def test_a_class_in_a_file_with_its_arguments(tmp_path: Path) -> None:
    write(
        tmp_path / "own.py",
        f"import dtrain\nclass T(dtrain.Task):\n  def __init__(self, a=1): self.a = a\n{METHODS}",
    )
    assert load_task("own.py:T", {"a": 5}, tmp_path).a == 5
    first, second = (type(load_task("own.py:T", {}, tmp_path)) for _ in range(2))
    assert first is second
    assert pickle.loads(pickle.dumps(load_task("own.py:T", {}, tmp_path))).a == 1


def test_a_file_elsewhere_finds_its_siblings(tmp_path: Path) -> None:
    write(tmp_path / "code" / "sibling_of_task.py", "VALUE = 7")
    write(
        tmp_path / "code" / "own.py",
        f"from sibling_of_task import VALUE\nclass T:\n  value = VALUE\n{METHODS}",
    )
    assert load_task("code/own.py:T", {}, tmp_path).model() == "model"
    assert load_task(f"{tmp_path}/code/own.py:T", {}, "/").model() == "model"


def test_a_module_in_a_package_next_to_the_job(tmp_path: Path) -> None:
    write(tmp_path / "own_package" / "__init__.py", "")
    write(
        tmp_path / "own_package" / "tasks.py",
        f"class Outer:\n  class T:\n{METHODS.replace('  def', '    def')}",
    )
    assert load_task("own_package.tasks:Outer.T", {}, tmp_path).model() == "model"


def test_two_files_of_one_name(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one" / "own.py", f"class T:\n  def __str__(self): return 'one'\n{METHODS}"
    )
    two = write(
        tmp_path / "two" / "own.py", f"class T:\n  def scheduler(self, o): return 'two'\n{METHODS}"
    )
    assert load_task("own.py:T", {}, one).scheduler(None) is None
    assert load_task("own.py:T", {}, two).scheduler(None) == "two"
    assert load_task("own.py:T", {}, one).scheduler(None) is None


def test_a_class_of_its_own_gets_the_defaults(tmp_path: Path) -> None:
    write(tmp_path / "own.py", f"class T:\n{METHODS}")
    task = load_task("own.py:T", {}, tmp_path)
    assert isinstance(task, Task)
    assert task.eval_dataset() is None
    assert task.evaluate("m", 3) == {"loss": 3}  # through its own loss
    assert task.collate([1, 2]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("reference", "args", "code", "names"),
    [
        ("own.py", {}, "job.reference-syntax", ["task: ", "'own.py'"]),
        ("gone.py:T", {}, "job.code-not-found", ["task: ", "gone.py"]),
        ("own.py:X", {}, "job.class-not-found", ["task: ", "own.py", "'X'", "T, Half"]),
        ("no_such_package.x:T", {}, "job.code-not-found", ["task: ", "'no_such_package'"]),
        ("own.py:T", {"a": 1, "b": 1}, "task.bad-arguments", ["args: ", "T(a, b)", "'b'"]),
        ("own.py:T", {}, "task.bad-arguments", ["args: ", "T()", "'a'"]),
        ("own.py:Half", {}, "job.task-incomplete", ["task: ", "Half", "loss(), optimizer()"]),
    ],
)
def test_what_is_wrong_has_a_code(
    tmp_path: Path, reference: str, args: dict[str, int], code: str, names: list[str]
) -> None:
    write(
        tmp_path / "own.py",
        f"class T:\n  def __init__(self, a): pass\n{METHODS}\n"
        "class Half:\n  def model(self): pass\n  def train_dataset(self): pass\n",
    )
    with raises(code, *names, kind=JobError):
        load_task(reference, args, tmp_path)


def test_errors_of_the_users_own_code_come_through(tmp_path: Path) -> None:
    write(tmp_path / "broken.py", "import no_such_module_of_users")
    write(
        tmp_path / "raising.py",
        f"class T:\n  def __init__(self): raise TypeError('mine')\n{METHODS}",
    )
    for reference in ("broken.py:T", "broken:T"):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_of_users"):
            load_task(reference, {}, tmp_path)
    with pytest.raises(TypeError, match="mine"):
        load_task("raising.py:T", {}, tmp_path)


def test_nothing_chooses_a_framework_before_the_task_is_imported() -> None:
    """Workers are forked from a process that has imported the trainer and maybe the adapters."""
    named = [("trainer", name) for name in catalog.TRAINERS]
    named += [("framework", name) for name in catalog.FRAMEWORKS]
    modules = sorted({catalog.find(*each).partition(":")[0] for each in named})
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {modules}];"
        "sys.exit(str({'keras', 'lightning', 'pytorch_lightning'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
