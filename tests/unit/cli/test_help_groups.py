"""`--help` of every command: in groups, with examples, at 80 columns."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dtrain.cli.checkpoint.group import COMMANDS
from dtrain.cli.main import _COMMANDS, cli


@pytest.mark.parametrize("command", [*_COMMANDS, *(f"checkpoint {name}" for name in COMMANDS)])
def test_help_has_groups_and_examples_within_80_columns(command: str) -> None:
    done = CliRunner().invoke(
        cli, [*command.split(), "--help"], terminal_width=80, prog_name="dtrain"
    )
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert not [line for line in lines if len(line) > 80]
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[-1] == "Examples:"
    assert "More:" in titles
    assert sum(line.startswith("  # ") for line in lines) >= 2, "each example has its effect above"
    assert any(line.startswith("  dtrain ") for line in lines), "an example is a command line"


def test_options_of_a_launcher_stand_in_a_group_of_their_own() -> None:
    done = CliRunner().invoke(cli, ["launch", "--help"], prog_name="dtrain")
    titles = [line for line in done.output.splitlines() if line and not line.startswith(" ")]
    assert titles[1:] == [
        "What:",
        "How many processes:",
        "Where:",
        "Launcher torchrun:",
        "Launcher slurm:",
        "Launcher ray:",
        "Several runs:",
        "Watching:",
        "More:",
        "Examples:",
    ]
