"""A class becomes a job that names it by the file, module or script that it was written in."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dtrain
from dtrain.api.arguments import LaunchArguments, request, sections
from dtrain.api.task_class import job_of_class
from dtrain.errors import JobError, UsageError
from support.errors import assert_problems, raises

TASK = """
from dtrain import Task
class Net(Task):
    def __init__(self, width: int = 3): self.width = width
    def model(self): ...
    def train_dataset(self): ...
    def loss(self, model, batch): ...
    def optimizer(self, model): ...
    class Inner: ...
def make(): ...
"""
TRAIN = {"steps": 1, "global_batch_size": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project: a module, and a package with another."""
    project = tmp_path / "project"
    (project / "net_package" / "deep").mkdir(parents=True)
    (project / "net_module.py").write_text(TASK)
    (project / "net_package" / "__init__.py").write_text(TASK)
    (project / "net_package" / "deep" / "inner.py").write_text(TASK)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "net_installed.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.syspath_prepend(str(installed))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("net_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("module", "where", "reference"),
    [
        ("net_module", "project", "net_module.py:Net"),
        ("net_package", "project", "net_package:Net"),
        ("net_package.deep.inner", "project", "net_package.deep.inner:Net"),
        ("net_installed", "", "net_installed:Net"),
    ],
)
def test_a_class_is_named_by_its_file(
    module: str, where: str, reference: str, folder: Path
) -> None:
    task = importlib.import_module(module).Net
    job = job_of_class("launch", task, {"train": TRAIN})
    assert job.folder == folder / where
    assert job.values == {"name": "net", "task": reference, "train": TRAIN}
    plan = dtrain.plan(task, train=TRAIN, procs=2, runs=folder / "runs")
    assert (plan.world_size, plan.name, plan.job_dir) == (2, "net", str(folder / where))
    assert not (folder / "runs").exists()


def test_problems_are_placed_at_the_arguments(folder: Path) -> None:
    task = importlib.import_module("net_module").Net
    with pytest.raises(JobError) as caught:
        dtrain.plan(
            task,
            args={"widht": 4},
            train={"steps": "x"},
            procs="many",
            chekpoint={},
            set={"evel.b": 1},
        )
    assert_problems(
        caught.value.problems,
        ("job.unknown-argument", "plan(args=…): args.widht", "Net", "'width'"),
        ("job.unknown-field", "plan(chekpoint=…): chekpoint", "'checkpoint'"),
        ("job.wrong-type", "plan(procs=…): launch.procs_per_node", "'many'"),
        ("job.unknown-field", "plan(set={'evel.b': …}): evel", "'eval'"),
        ("job.missing-field", "plan(train=…): train.global_batch_size"),
        ("job.wrong-type", "plan(train=…): train.steps", "'x'"),
    )
    with raises("job.missing-field", "plan(Net): train: ", kind=JobError):
        dtrain.plan(task)


def test_values_keep_their_types(folder: Path) -> None:
    import numpy as np

    arguments: LaunchArguments = {
        "set": {"train.lr": np.float32(0.5), "data.paths": [Path("a"), "b"], "eval": None},
        "args": {"flag": "yes", "none": None, "shape": (1, np.int64(2))},
        "env": {"LEVEL": 3, "NAME": "x"},  # type: ignore[dict-item]
    }
    fields = request("launch", arguments, LaunchArguments).fields
    assert {name: value.plain() for name, value in fields.items()} == {
        "args": {"flag": "yes", "none": None, "shape": [1, 2]},
        "train.lr": 0.5,
        "data.paths": ["a", "b"],
        "eval": None,
        "launch.env.LEVEL": "3",
        "launch.env.NAME": "x",
    }
    assert type(fields["train.lr"].value) is float


@pytest.mark.parametrize(
    ("wrong", "code", "name"),
    [
        ({"args": {"x": object()}}, "api.value-not-for-jobs", "builtins.object"),
        ({"args": {(1, 2): 3}}, "api.value-not-for-jobs", "(1, 2)"),
        ({"set": ["train.lr=1"]}, "api.invalid-argument", "['train.lr=1']"),
        ({"env": "A=1"}, "api.invalid-argument", "'A=1'"),
    ],
)
def test_values_that_no_job_has(wrong: Any, code: str, name: str, folder: Path) -> None:
    (argument,) = wrong
    with raises(code, f"launch({argument}=…): ", name, kind=UsageError):
        dtrain.launch("job.yaml", **wrong)


def test_what_is_no_class_of_a_file(folder: Path) -> None:
    module = importlib.import_module("net_module")
    assert job_of_class("launch", module.make, {}).values["task"] == "net_module.py:make"
    with raises("api.class-not-importable", "Net.Inner", kind=UsageError):
        job_of_class("launch", module.Net.Inner, {})
    with raises("api.invalid-argument", "launch()", "not a Net", kind=UsageError):
        job_of_class("launch", module.Net(), {})
    with raises("api.invalid-argument", "verify()", "not 3", kind=UsageError):
        dtrain.verify(3)
    module.Net.__module__ = "nowhere"
    with raises("api.class-not-importable", " Net ", "module nowhere", kind=UsageError):
        job_of_class("launch", module.Net, {})
    with pytest.raises(TypeError, match=r"resume\(\) got an unexpected keyword argument 'run_id'"):
        dtrain.resume(run_id="x")  # type: ignore[call-arg]


SCRIPT = """
import {imported}
{task}
{call}
"""


@pytest.mark.parametrize(
    ("imported", "call"),
    [
        ("dtrain", "run = dtrain.launch(Net, train={})"),
        ("dtrain as d", "with d.launch(Net, train={}) as run:\n    pass"),
        ("dtrain\nfrom dtrain import launch as go", "if True:\n    go(Net, train={}).wait()"),
    ],
)
def test_a_script_that_workers_would_run_again(imported: str, call: str, folder: Path) -> None:
    script = folder / "train.py"
    script.write_text(SCRIPT.format(imported=imported, task=TASK, call=call))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "UsageError: train.py:1" in done.stderr
    assert 'under `if __name__ == "__main__":`' in done.stderr


def test_a_script_and_a_class_of_no_file(folder: Path) -> None:
    script = folder / "project" / "train.py"
    call = 'print(dtrain.plan(Net, train={"steps": 1, "global_batch_size": 4}).job_dir)'
    guarded = f'if __name__ == "__main__":\n    {call}'
    script.write_text(SCRIPT.format(imported="dtrain", task=TASK, call=guarded))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout == f"{folder / 'project'}\n", done.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"import dtrain\n{TASK}\n{call}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UsageError: Net has no source" in done.stderr


def test_a_worker_does_not_launch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_ATTEMPT", "0")
    monkeypatch.setenv("RANK", "0")
    name = '`if __name__ == "__main__":`'
    with raises("api.launch-at-import", name, kind=UsageError):
        dtrain.launch("job.yaml")


def test_a_signature_shows_all_arguments() -> None:
    import inspect

    from dtrain.job.script import PROGRAMS
    from dtrain.job.spec import JobSpec
    from dtrain.planning import FIELDS

    shown = inspect.signature(dtrain.launch).parameters
    assert {"nodes", "set", "launcher", "train", "detach"} <= shown.keys()
    assert shown["launcher"].default is None
    # every section of a job is an argument, and every argument is documented
    documented = set(JobSpec.model_fields) - {"task", *PROGRAMS}
    assert documented <= {*shown} | {field for field in FIELDS.values() if "." not in field}
    assert dtrain.launch.__doc__ is not None
    assert all(f" {name}:" in dtrain.launch.__doc__ or f"`{name}`" in dtrain.launch.__doc__
               for name in shown)  # fmt: skip


def test_dtrain_plan_is_a_function_after_its_modules_are_imported() -> None:
    code = (
        "import dtrain.launch_plan, dtrain.verification.report, dtrain\n"
        "from dtrain.launch_plan import LaunchPlan\n"
        "assert callable(dtrain.plan) and callable(dtrain.verify), dtrain.plan\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "from dtrain import plan, verify, launch, runs, Run; assert callable(plan)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_job_that_is_written_can_be_launched_by_the_command(folder: Path) -> None:
    task = importlib.import_module("net_module").Net
    from dtrain.planning import plan_run

    arguments: LaunchArguments = {"train": TRAIN, "args": {"width": 5}, "runs": folder}
    job = job_of_class("launch", task, sections(arguments))
    text = plan_run(job, request("launch", arguments, LaunchArguments)).job.text
    assert yaml.safe_load(text) == {**job.values}
    (folder / "project" / "job.yaml").write_text(text)
    again = dtrain.plan(folder / "project" / "job.yaml", runs=folder)
    assert again.name == "net"
