"""How an error is shown to a person and to a script: one form for all, with a code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.main import main
from dtrain.errors import DtrainError, JobError, Problem, format_error
from support.errors import assert_shown
from support.launch import TINY

Run = Callable[..., str]
DTRAIN = (sys.executable, "-P", "-m", "dtrain")


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command that must end with a code; its stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        shown = capsys.readouterr()
        assert (end.value.code, shown.out) == (code, "")
        return shown.err

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "command"),
    [
        (["lunch"], "usage.unknown-command", "dtrain"),
        (["--nix"], "usage.unknown-option", "dtrain"),
        (["launch"], "usage.missing-argument", "dtrain launch"),
        (["plan", "--nods", "2", str(TINY)], "usage.unknown-option", "dtrain plan"),
        (["why", "a", "b"], "usage.unexpected-argument", "dtrain why"),
        (["why", "--attempt", "x"], "usage.invalid-value", "dtrain why"),
        (["why", "--attempt"], "usage.option-without-value", "dtrain why"),
        (["launch", "--json", str(TINY)], "usage.flag-without-effect", "dtrain launch"),
        (["plan", "-e", "NIX_X", str(TINY)], "usage.variable-not-set", "dtrain plan"),
    ],
)
def test_a_mistake_in_the_command_line(
    refused: Run, arguments: list[str], code: str, command: str
) -> None:
    if "--json" in arguments:
        assert json.loads(refused(*arguments))["error"]["code"] == code
        return
    first, hint = refused(*arguments).splitlines()
    assert first.startswith("dtrain: ")
    assert first.endswith(f"  [{code}]")
    assert hint == f"see: {command} --help"


def test_each_problem_of_a_job_has_a_line_and_a_code(refused: Run) -> None:
    flags = ("--set", "train.epoch=2", "--set", "train.steps=x", "--set", "args.nix=1")
    lines = refused("plan", *flags, str(TINY)).splitlines()
    begun = [line.split(": ")[:3] for line in lines]
    assert begun == [["dtrain", each, each.split()[1].split("=")[0]] for each in (
        "--set args.nix=1", "--set train.epoch=2", "--set train.steps=x"
    )]  # fmt: skip
    codes = [line.rpartition("  ")[2] for line in lines]
    assert codes == ["[job.unknown-argument]", "[job.unknown-field]", "[job.wrong-type]"]


def test_an_error_as_json(refused: Run, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: a\ntask: nix.py:T\ntrain:\n  epochs: 1\n  global_batch_size: -4\n")
    error: dict[str, Any] = json.loads(refused("plan", "--json", str(job)))["error"]
    assert (error["code"], error["exit_code"]) == ("job.code-not-found", 2)
    _, second = error["problems"]
    assert error["message"].startswith("job.yaml:2:7: task: ")
    place = {"file": "job.yaml", "line": 5, "column": 22, "field": "train.global_batch_size"}
    assert second["code"] == "job.out-of-range"
    assert {name: second[name] for name in place} == place
    assert set(second) == {*place, "code", "message"}
    other = json.loads(refused("why", "nix", "--json"))["error"]
    assert (other["code"], other["problems"]) == ("run.no-runs", [])


def test_arguments_of_a_script_choose_no_json(refused: Run) -> None:
    shown = refused("launch", "nix.py", "--", "--json")
    assert_shown(shown, "job.script-not-found", "dtrain: ", "nix.py")


def test_a_long_text_has_its_code_in_the_first_line() -> None:
    assert (
        format_error(DtrainError("one\n  two", code="run.held")) == "dtrain: one  [run.held]\n  two"
    )
    problems = [Problem("job.yaml", k, 1, "", "x", "yaml.syntax") for k in range(1, 53)]
    lines = format_error(JobError(problems)).splitlines()
    assert len(lines) == 51
    assert lines[-1] == "dtrain: and 2 more"


@pytest.mark.parametrize("no_color", [False, True])
def test_the_code_is_dim_on_a_terminal(no_color: bool) -> None:
    terminal, stderr = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    variables |= {"TERM": "xterm", **({"NO_COLOR": "1"} if no_color else {})}
    done = subprocess.run([*DTRAIN, "lunch"], stderr=stderr, env=variables, check=False, timeout=60)
    os.close(stderr)
    shown = os.read(terminal, 4096)
    os.close(terminal)
    code = b"[usage.unknown-command]" if no_color else b"\x1b[2m[usage.unknown-command]\x1b[0m"
    assert done.returncode == 2
    assert shown.splitlines()[0].endswith(code)
