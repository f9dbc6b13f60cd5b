"""`--help` is instant: it loads nothing that it does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dtrain.cli.checkpoint.group import COMMANDS
from dtrain.cli.main import _COMMANDS

HEAVY = {"torch", "ray", "lightning", "pytorch_lightning", "keras", "numpy", "pydantic", "rich"}

PROBE = """
import json, sys
from dtrain.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def loaded(*arguments: str) -> tuple[set[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
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
