"""`dtrain`: the group of all commands. It imports none of them until it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click

from dtrain.console import out
from dtrain.errors import DtrainError, UsageError, printable

# name → (module, one line of help). The lines are here so that `dtrain --help` imports no command,
# no pydantic and no torch: it is the first command that most users try.
_COMMANDS = {
    "launch": (
        "dtrain.cli.launch",
        "Train a job on one or more processes: on this machine, other hosts, Slurm or Ray.",
    ),
    "plan": (
        "dtrain.cli.plan",
        "Show every command, variable and file of a launch; start nothing.",
    ),
    "resume": ("dtrain.cli.resume", "Continue a run from its newest intact checkpoint."),
    "runs": ("dtrain.cli.runs", "List the runs."),
    "status": ("dtrain.cli.status", "Show a run's state, progress and newest metrics."),
    "logs": ("dtrain.cli.logs", "Show what the ranks of a run wrote, and follow it."),
    "why": ("dtrain.cli.why", "Why a run failed: the culprit, its error, what to try."),
    "cancel": ("dtrain.cli.cancel", "Stop a run: its workers save a checkpoint, then exit."),
    "verify": (
        "dtrain.cli.verify",
        "Check that a job is the same training under every strategy and size.",
    ),
    "export": ("dtrain.cli.export", "Write a run's model for other programs, and check it."),
    "launchers": ("dtrain.cli.launchers", "List launchers, profiles and their options."),
    "completion": ("dtrain.cli.completion", "Print the script that completes commands in a shell."),
    "schema": ("dtrain.cli.schema", "Print the JSON Schema of job.yaml, for editors."),
}


_MEANT = {
    "help": "--help",
    "info": "status",
    "kill": "cancel",
    "list": "runs",
    "log": "logs",
    "ls": "runs",
    "ps": "runs",
    "run": "launch",
    "show": "status",
    "start": "launch",
    "stop": "cancel",
    "submit": "launch",
    "tail": "logs",
    "train": "launch",
}
"""Names of commands in other tools, and dtrain's names for them."""


def _nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to one, ignoring leading dashes."""
    from difflib import get_close_matches

    bare = {name.lstrip("-"): name for name in known}
    near = get_close_matches(word.lstrip("-"), bare, n=1)
    return bare[near[0]] if near else None


class _LazyGroup(click.Group):
    """A group that imports a command when it is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _readers_may_leave():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _readers_may_leave():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = _MEANT.get(args[0]) or _nearest(args[0], _COMMANDS)
            hint = f" Did you mean {near!r}?" if near else ""
            text = f"No command {args[0]!r}.{hint}"
            raise UsageError(text, code="usage.unknown-command") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@contextlib.contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Exit like other programs whose reader has closed, as in `dtrain logs | head -1`.

    click itself would exit with 1.
    """
    try:
        yield
    except BrokenPipeError as error:
        if not out.is_gone(error):
            raise
        out.give_up()
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None


def _version(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        import platform
        from importlib.metadata import version

        parts = ("dtrain", "torch")
        versions = [f"{name} {version(name)}" for name in parts]
        click.echo(", ".join([*versions, f"Python {platform.python_version()}"]))
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "max_content_width": 80,
    },
)
@click.option(
    "--version",
    is_flag=True,
    callback=_version,
    expose_value=False,
    is_eager=True,
    help="Show the versions of dtrain, torch and Python, and exit.",
)
def cli() -> None:
    """One training definition, launched anywhere, provably the same training, and hard to kill.

    \b
    dtrain launch job.yaml                       train as job.yaml describes
    dtrain launch --nodes 2 --procs 2 job.yaml   two simulated nodes, two ranks on each
    dtrain launch --gpus 4 job.yaml              train on four GPUs of this machine
    """


def main(argv: list[str] | None = None) -> Any:
    """Run the command line. Errors meant for users are printed without a traceback."""
    out.prepare()
    try:
        status = cli.main(args=argv, prog_name="dtrain", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except (click.ClickException, DtrainError, OSError) as error:
        known = _as_dtrain_error(error)
        if known is None:
            raise
        words = sys.argv[1:] if argv is None else argv
        words = words[: words.index("--")] if "--" in words else words
        command = next((word for word in words if word in _COMMANDS), "")
        out.complain(known, command, as_json="--json" in words)
        sys.exit(known.exit_code)
    sys.exit(status if isinstance(status, int) else 0)


_CLICK_CODES = {
    "NoSuchOption": "usage.unknown-option",
    "MissingParameter": "usage.missing-argument",
    "BadParameter": "usage.invalid-value",
    "BadOptionUsage": "usage.option-without-value",
    "UsageError": "usage.unexpected-argument",
}
"""The code of each of click's errors. If several classes match, the nearest one counts."""


def _as_dtrain_error(error: click.ClickException | DtrainError | OSError) -> DtrainError | None:
    """Return the error to report, with its code. None for an unexpected error."""
    if isinstance(error, DtrainError):
        return error
    if isinstance(error, click.ClickException):
        if isinstance(error, click.NoSuchOption):
            near = _nearest(error.option_name, error.possibilities or ())
            error.possibilities = [near] if near else None  # type: ignore[misc]
        names = (each.__name__ for each in type(error).__mro__)
        name = next(name for name in names if name in _CLICK_CODES)
        return UsageError(error.format_message(), code=_CLICK_CODES[name])
    if out.is_gone(error):
        out.give_up()
        return DtrainError(f"cannot print: {error.strerror}", code="file.console-gone")
    if error.filename is not None:
        place = printable(str(error.filename), most=300)
        kind = UsageError if error.errno == errno.ENAMETOOLONG else DtrainError
        return kind(f"{place}: {error.strerror}", code="file.not-usable")
    if _is_nowhere():
        text = "the current directory is gone; change to one that is there"
        return UsageError(text, code="file.current-directory-gone")
    return None


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
