"""`--help` and commands that read a run start quickly: they load nothing that they do not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.cli.checkpoint.group import COMMANDS
from dtrain.cli.main import _COMMANDS
from support.written_runs import write_run

HEAVY = {"torch", "ray", "lightning", "pytorch_lightning", "keras", "numpy", "pydantic", "rich"}

PROBE = """
import json, sys
from dtrain.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print()
names = {name.split(".")[0] for name in sys.modules}
print(json.dumps(sorted(names | {name for name in sys.modules if name.startswith("dtrain.")})))
"""

READING = {
    "status one": set(),
    "why one": set(),
    "top one --json": set(),
    "logs one": set(),
    "runs": {"yaml"},
    "compare one two": {"yaml"},
    "report one two": {"yaml"},
}
"""Commands that read runs, and what each needs of the packages below."""
OF_JOBS = {"dtrain.job.spec", "dtrain.job.fields", "dtrain.job.load", "yaml"}
"""What reads a job. The models alone take a tenth of a second."""


def loaded(*arguments: str, cwd: Path | None = None) -> tuple[set[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True, text=True, check=True, cwd=cwd,
    )  # fmt: skip
    text, _, names = done.stdout.rstrip().rpartition("\n")
    return set(json.loads(names)), text


def test_group_help_loads_nothing_heavy() -> None:
    names, text = loaded("--help")
    assert not names & HEAVY
    for command in _COMMANDS:
        assert f"  {command}" in text


@pytest.mark.parametrize("command", [*_COMMANDS, "checkpoint diff"])
def test_command_help_loads_nothing_heavy(command: str) -> None:
    names, text = loaded(*command.split(), "--help")
    assert not names & HEAVY
    assert text.startswith("Usage:")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two runs: one that runs, in this process, and one that has ended."""
    folder = tmp_path_factory.mktemp("reading")
    write_run(folder / "runs", "two", metrics={"train": {"loss": 0.5}})
    write_run(folder / "runs", "one", state=None, metrics={"train": {"loss": 0.5}})
    return folder


@pytest.mark.parametrize("command", READING)
def test_reading_a_run_loads_no_job(command: str, runs: Path) -> None:
    names, _ = loaded(*command.split(), cwd=runs)
    assert "dtrain.run.files" in names
    assert not names & ((HEAVY - {"pydantic"}) | OF_JOBS) - READING[command]


def test_summaries_say_what_the_commands_say() -> None:
    """The one-line summaries stand in the table so that no command is imported for them."""
    import importlib

    for module, summary in (*_COMMANDS.values(), *COMMANDS.values()):
        assert summary.endswith(".")
        assert importlib.import_module(module).command.help


def test_import_dtrain_loads_nothing_heavy() -> None:
    code = "import sys, dtrain; print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name for name in HEAVY if f"'{name}'" in done.stdout}
