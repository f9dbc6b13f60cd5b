"""`dtrain`: the group of all commands. It imports none of them until it is called."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from dtrain.cli.lazy import LazyGroup, nearest
from dtrain.console import out
from dtrain.errors import DtrainError, UsageError, printable

# name → (module, one line of help). The lines are here so that `dtrain --help` imports no command,
# no pydantic and no torch: it is the first command that most users try.
_COMMANDS = {
    "init": ("dtrain.cli.init", "Write a first job, with a profile that fits this place."),
    "launch": (
        "dtrain.cli.launch",
        "Train a job on one or more processes: on this machine, other hosts, Slurm or Ray.",
    ),
    "plan": (
        "dtrain.cli.plan",
        "Show every command, variable and file of a launch; start nothing.",
    ),
    "doctor": (
        "dtrain.cli.doctor",
        "Check this machine, a job and a cluster: what is wrong, and what mends it.",
    ),
    "resume": ("dtrain.cli.resume", "Continue a run from its newest intact checkpoint."),
    "runs": ("dtrain.cli.runs", "List the runs: all, or those that match, in any order."),
    "compare": ("dtrain.cli.compare", "What differs between runs, and where their losses part."),
    "clean": ("dtrain.cli.clean", "Remove leftovers, old checkpoints and old runs, after asking."),
    "status": ("dtrain.cli.status", "Show a run's state, progress and newest metrics."),
    "top": ("dtrain.cli.top", "Watch a run: progress, metrics, ranks, nodes, warnings."),
    "logs": ("dtrain.cli.logs", "Show what the ranks of a run wrote, and follow it."),
    "why": ("dtrain.cli.why", "Why a run failed: the culprit, its error, what to try."),
    "report": ("dtrain.cli.report", "Write an HTML page about the course of runs."),
    "cancel": ("dtrain.cli.cancel", "Stop a run: its workers save a checkpoint, then exit."),
    "bench": (
        "dtrain.cli.bench",
        "Measure collectives, links, loader and steps; say what to change.",
    ),
    "verify": (
        "dtrain.cli.verify",
        "Check that a job is the same training under every strategy and size.",
    ),
    "export": ("dtrain.cli.export", "Write a run's model for other programs, and check it."),
    "checkpoint": (
        "dtrain.cli.checkpoint.group",
        "List, verify, compare, export, remove or pin the checkpoints of a run.",
    ),
    "launchers": ("dtrain.cli.launchers", "List launchers, profiles and their options."),
    "completion": ("dtrain.cli.completion", "Print the script that completes commands in a shell."),
    "schema": ("dtrain.cli.schema", "Print the JSON Schema of job.yaml, for editors."),
}


_MEANT = {
    "benchmark": "bench",
    "check": "doctor",
    "checkpoints": "checkpoint",
    "create": "init",
    "delete": "clean",
    "diagnose": "doctor",
    "diff": "compare",
    "env": "doctor",
    "help": "--help",
    "info": "status",
    "kill": "cancel",
    "list": "runs",
    "log": "logs",
    "ls": "runs",
    "new": "init",
    "ps": "runs",
    "prune": "clean",
    "rm": "clean",
    "run": "launch",
    "show": "status",
    "start": "launch",
    "stop": "cancel",
    "submit": "launch",
    "tail": "logs",
    "train": "launch",
}
"""Names of commands in other tools, and dtrain's names for them."""


def _version(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        import platform
        from importlib.metadata import version

        parts = ("dtrain", "torch")
        versions = [f"{name} {version(name)}" for name in parts]
        click.echo(", ".join([*versions, f"Python {platform.python_version()}"]))
        ctx.exit()


@click.group(
    cls=LazyGroup,
    table=_COMMANDS,
    meant=_MEANT,
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
        command = _named(words)
        out.complain(known, command, as_json="--json" in words)
        sys.exit(known.exit_code)
    sys.exit(status if isinstance(status, int) else 0)


def _named(words: list[str]) -> str:
    """Return the command that a line names, for example `checkpoint list`. Empty without one."""
    named: list[str] = []
    group: click.Command | None = cli
    while isinstance(group, LazyGroup):
        known = group.list_commands(click.Context(group))
        word = next((word for word in words if word in known), None)
        if word is None:
            break
        named.append(word)
        words = words[words.index(word) + 1 :]
        group = group.get_command(click.Context(group), word)
    return " ".join(named)


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
            near = nearest(error.option_name, error.possibilities or ())
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
