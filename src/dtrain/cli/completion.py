"""`dtrain completion`: the script that lets a shell complete dtrain's command lines."""

from __future__ import annotations

import click

from dtrain.cli import options as shared

SHELLS = ("bash", "zsh", "fish")
# click's scripts put a space after every completion, also after `train.epochs=`, where the value
# must follow. fish puts none after `=`.
_NO_SPACE = {
    "bash": (
        "COMPREPLY+=($value)",
        "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace",
    ),
    "zsh": (
        'completions+=("$key")',
        '[[ "$key" == *= ]] && compadd -U -S \'\' -- "$key" || completions+=("$key")',
    ),
}


@click.command(
    "completion",
    cls=shared.Command,
    examples=(
        (
            'eval "$(dtrain completion bash)"',
            "The line for ~/.bashrc; for zsh, write zsh here and in ~/.zshrc.",
        ),
        (
            "dtrain completion fish > ~/.config/fish/completions/dtrain.fish",
            "For fish, run this once.",
        ),
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, options, profiles, runs and fields of job.yaml.
    """
    from click.shell_completion import get_completion_class

    from dtrain.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    text = found(cli, {}, "dtrain", "_DTRAIN_COMPLETE").source()
    before, after = _NO_SPACE.get(shell, ("", ""))
    click.echo(text.replace(before, after))
