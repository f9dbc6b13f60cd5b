"""Jobs with a script, a module or a command: the fields they may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain import catalog
from dtrain.errors import JobError
from dtrain.job.load import load_job
from support.errors import assert_problems

PROGRAMS = {"script": "train.py", "module": "pkg.train", "command": "[./train.sh, --fast]"}


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pkg").mkdir()
    for path in ("train.py", "pkg/__init__.py", "pkg/train.py", "train.sh", "pkg/__main__.py"):
        Path(path).write_text("print('hello')\n")
    Path("train.sh").chmod(0o755)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_has_few_fields(kind: str) -> None:
    job = f"name: mine\n{kind}: {PROGRAMS[kind]}\n"
    Path("job.yaml").write_text(f"{job}script_args: [--lr, '0.1']\nlaunch: {{nodes: 2}}\n")
    spec = load_job("job.yaml").spec
    assert (spec.program, spec.trainer, spec.strategy) == (kind, "script", catalog.OWN)
    fields = {"name", "script_args", "accelerate_config", "profile", "launch"}
    assert {*spec.to_plain()} == {*fields, kind}
    for lines, expected in (
        (
            "strategy: ddp\n",
            ("plan.unsupported-combination", "job.yaml:3:11: strategy", "'ddp'", "program"),
        ),
        (
            "trainer: native\n",
            ("plan.unsupported-combination", "job.yaml:3:10: strategy", "'native'", kind),
        ),
        ("train: {steps: 3}\n", ("job.field-without-effect", "job.yaml:3:1: train", kind)),
        ("script_args: [3]\n", ("job.wrong-type", "job.yaml:3:15: script_args[0]", "number 3")),
        ("task: a.py:T\n", ("job.field-without-effect", "job.yaml:3:7: task", kind)),
    ):
        Path("job.yaml").write_text(f"{job}{lines}")
        with pytest.raises(JobError) as caught:
            load_job("job.yaml")
        assert_problems(caught.value.problems[:1], expected)


def test_a_job_has_one_program() -> None:
    Path("job.yaml").write_text("name: mine\nscript: train.py\nmodule: pkg.train\n")
    with pytest.raises(JobError) as caught:
        load_job("job.yaml")
    expected = ("job.field-without-effect", "job.yaml:3:9: module", "script, module, command")
    assert_problems(caught.value.problems, expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("module: pkg.none", ("job.module-not-found", "job.yaml:2:9: module", "pkg.none")),
        ("module: pkg/train.py", ("job.module-not-found", "job.yaml:2:9: module", "pkg.train")),
        ("module: 7", ("job.wrong-type", "job.yaml:2:9: module")),
        ("command: []", ("job.invalid-value", "job.yaml:2:10: command")),
        ("command: ./train.sh", ("job.wrong-type", "job.yaml:2:10: command")),
        ("command: [./none.sh]", ("job.command-not-found", "job.yaml:2:10: command", "none.sh")),
        (
            "command: [./train.py]",
            ("job.command-not-executable", "job.yaml:2:10: command", "train.py"),
        ),
        ("command: [3]", ("job.wrong-type", "job.yaml:2:11: command[0]")),
    ],
)
def test_a_program_that_cannot_be_run(line: str, expected: tuple[str, ...]) -> None:
    Path("job.yaml").write_text(f"name: mine\n{line}\n")
    with pytest.raises(JobError) as caught:
        load_job("job.yaml")
    assert_problems(caught.value.problems[:1], expected)


def test_a_package_is_run_by_its_main_module() -> None:
    Path("job.yaml").write_text("name: mine\nmodule: pkg\n")
    assert load_job("job.yaml").spec.module == "pkg"
    Path("pkg/__main__.py").unlink()
    with pytest.raises(JobError) as caught:
        load_job("job.yaml")
    assert_problems(
        caught.value.problems, ("job.module-not-found", "job.yaml:2:9: module", "__main__")
    )
