"""Options that several commands share, and how they become a plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtrain.launchers import flags
from dtrain.launchers.flags import Flag

if TYPE_CHECKING:
    from dtrain.planning import Request

_Function = TypeVar("_Function", bound=Callable[..., Any])

runs_option = click.option(
    "--runs",
    default="runs",
    envvar="DTRAIN_RUNS",
    show_default=True,
    metavar="DIR|URL",
    help="Folder of all runs, or a URL, as s3://bucket/runs.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
script_arguments = click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- …]")
run_argument = click.argument("run", default="last")

_SIZE_OPTIONS = (
    click.option("--nodes", "--nnodes", metavar="N|MIN:MAX", help="Number of nodes."),
    click.option("--gpus", "--gpus-per-node", metavar="N",
                 help="GPUs per node; 0 trains on the CPU."),
    click.option("--procs", "--nproc-per-node", "--procs-per-node", metavar="N",
                 help="Processes per node."),
    click.option("--strategy", metavar="NAME", help="How processes share the work."),
    click.option("--max-restarts", metavar="N", help="Restarts of failed workers."),
    click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE",
                 help="Any field of job.yaml, as train.epochs=3; may be repeated."),
    click.option("--env", "environment", multiple=True, metavar="NAME=VALUE",
                 help="A variable for every worker; may be repeated."),
)  # fmt: skip
_JOB_OPTIONS = (
    click.option("--launcher", default="local", show_default=True, metavar="NAME",
                 help="A profile: launchers/NAME.yaml, yours or the packaged one."),
    click.option("--trainer", metavar="NAME", help="Whose loop runs."),
    click.option("--seed", metavar="N", help="Seed of the whole training."),
    click.option("--name", metavar="TEXT", help="Name of the run."),
    click.option("--inject", "inject", multiple=True, metavar="RANK,STEP,KIND",
                 help="A fault on purpose, as rank=1,step=5,kind=flip-gradient-bit; see docs."),
    click.option("--run-id", metavar="ID",
                 help="Id of the run; needed where several hosts start the same run."),
)  # fmt: skip


_OF_LAUNCHER = "launcher_option_"
"""Begins the names of arguments that are options of a launcher."""


def _click_option(flag: Flag) -> Callable[[_Function], _Function]:
    return click.option(
        *flag.names,
        f"{_OF_LAUNCHER}{flag.option}",
        multiple=flag.multiple,
        metavar=flag.metavar,
        help=f"Launcher {flag.launcher}: {flag.help}",
    )


class LaunchCommand(click.Command):
    """A command that also takes the flags of launchers from outside.

    They are looked for only where one is not known, or help is asked for: that takes 0.1 s.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        if {"--help", "-h"} & {*args} and "--launcher" in " ".join(args):
            self._add_outside()
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            if not self._add_outside():
                raise
            return super().parse_args(ctx, given)

    def _add_outside(self) -> bool:
        known = {param.name for param in self.params}
        for each in flags.outside():
            if f"{_OF_LAUNCHER}{each.option}" not in known:
                _click_option(each)(self)
        return len(self.params) > len(known)


def size_options(function: _Function) -> _Function:
    """Options that say how large a launch is; for launch, plan and resume."""
    for option in reversed((*_SIZE_OPTIONS, *map(_click_option, flags.FLAGS), runs_option)):
        function = option(function)
    return function


def job_options(function: _Function) -> _Function:
    """Options that only a new run has; for launch and plan."""
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return size_options(function)


def request(options: dict[str, Any]) -> Request:
    """What a command was asked for besides the job."""
    from dtrain.planning import Request

    of_launcher = {
        name.removeprefix(_OF_LAUNCHER): value
        for name, value in options.items()
        if name.startswith(_OF_LAUNCHER) and value
    }
    return Request(
        launcher=options.get("launcher", ""),
        runs=options["runs"],
        run_id=options.get("run_id"),
        overrides=options["overrides"],
        fields=written_flags(options),
        options=of_launcher,
    )


def written_flags(options: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as fields of job.yaml with the flag's spelling for errors."""
    from dtrain.job.load import flag
    from dtrain.planning import FIELDS

    written = {
        field: flag(f"--{name.replace('_', '-')}", _number(options[name]))
        for name, field in FIELDS.items()
        if options.get(name) is not None
    }
    if options.get("arguments"):
        written["arguments"] = flag("--", list(options["arguments"]))
    if options.get("inject"):
        written["checks.inject"] = flag("--inject", list(options["inject"]))
    for text in options["environment"]:
        name, equals, value = text.partition("=")
        if not equals:
            if name not in os.environ:
                raise click.UsageError(f"--env {name}: not set here; write --env {name}=VALUE")
            value = os.environ[name]
        written[f"launch.env.{name}"] = flag(f"--env {name}", value)
    return written


def _number(text: str) -> Any:
    from dtrain.job.units import is_number

    return int(text) if is_number(text.removeprefix("-")) else text


def print_json(value: Any) -> None:
    from dtrain.plainjson import to_json

    click.echo(to_json(value, indent=2))
