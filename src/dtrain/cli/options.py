"""Options that several commands share, their groups in `--help`, and how they become a plan."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtrain.cli import completers
from dtrain.errors import UsageError
from dtrain.launchers import flags
from dtrain.launchers.flags import Flag
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.job.located import Located
    from dtrain.planning import Job, Request

_Function = TypeVar("_Function", bound=Callable[..., Any])

WHAT = "What"
SIZE = "How many processes"
WHERE = "Where"
SWEEP = "Several runs"
WATCH = "Watching"
MORE = "More"
_WIDEST = 26


class _Option(click.Option):
    """An option with its own group in `--help`."""

    def __init__(self, *args: Any, group: str = MORE, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def option(group: str, *names: str, **settings: Any) -> Callable[[_Function], _Function]:
    """Declare an option, as `click.option` does, in a group of `--help`."""
    return click.option(*names, cls=_Option, group=group, **settings)


class Command(click.Command):
    """A command whose `--help` has groups of options, and examples at the end."""

    def __init__(self, *args: Any, examples: tuple[tuple[str, str], ...] = (), **more: Any) -> None:
        """Take click's arguments, and examples: command lines, each with its effect."""
        super().__init__(*args, **more)
        self._examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {WHAT: [], SIZE: [], WHERE: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "group", MORE), []).append(record)
        for last in (SWEEP, WATCH, MORE):
            groups[last] = groups.pop(last, [])
        width = min(_WIDEST, max(len(name) for part in groups.values() for name, _ in part))
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    aligned = [(name.ljust(width), text) for name, text in records]
                    formatter.write_dl(aligned, col_max=width)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self._examples:
            formatter.write_paragraph()
            formatter.write_text("Examples:")
            for line, text in self._examples:
                formatter.write(f"  # {text}\n  {line}\n")


runs_option = option(
    WHERE,
    "--runs",
    default="runs",
    envvar="DTRAIN_RUNS",
    show_default=True,
    metavar="DIR|URL",
    help="Directory of all runs, or a URL, for example s3://bucket/runs.",
)
json_option = option(WATCH, "--json", "as_json", is_flag=True, help="Print JSON.")
quiet_option = option(
    WATCH, "-q", "--quiet", is_flag=True, help="Show only the end and what went wrong."
)
dry_run_option = option(
    WATCH, "--dry-run", "--dryrun", is_flag=True, help="Show the plan and start nothing."
)
explain_option = option(
    WATCH, "--explain", is_flag=True, help="Show in the plan where each value came from."
)
detach_option = option(
    WATCH, "--detach", is_flag=True, help="Submit and return; launchers slurm and ray."
)
preflight_option = option(
    MORE,
    "--preflight",
    is_flag=True,
    help="First let the nodes check themselves and one another, as `dtrain doctor` does.",
)
at_once_option = option(
    SWEEP,
    "--at-once",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many runs of a sweep may run at a time.  [default: as many as find place]",
)
option_option = option(
    WHERE,
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    shell_complete=completers.options,
    help="Set an option of the launcher; repeatable. `dtrain launchers NAME` lists them.",
)
script_arguments = click.argument("script_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- …]")
run_argument = click.argument("run", default="last", shell_complete=completers.runs)
checkpoint_argument = click.argument("checkpoint", default="last", shell_complete=completers.runs)
job_argument = click.argument("job", required=False, shell_complete=completers.files)

_PROGRAM_OPTIONS = (
    option(WHAT, "-m", "--module", is_flag=True,
           help="JOB is a module, to be run as `python -m` would."),
    option(WHAT, "--no-python", is_flag=True,
           help="JOB is a program that need not be Python."),
    option(MORE, "--standalone", is_flag=True,
           help="As in torchrun: all nodes are on this host. It is the default."),
)  # fmt: skip
_SIZE_OPTIONS = (
    option(SIZE, "-N", "--nodes", "--nnodes", metavar="N|MIN:MAX", help="Number of nodes."),
    option(SIZE, "--procs", "--nproc-per-node", "--ntasks-per-node", metavar="N|gpu|cpu|auto",
           help="Processes per node: a number, or that of the GPUs or cores of this host.  "
                "[default: one per GPU, or one]"),
    option(SIZE, "--gpus", "--gpus-per-node", metavar="N",
           help="GPUs per node; 0 trains on the CPU."),
    option(SIZE, "--strategy", metavar="NAME", shell_complete=completers.strategies,
           help="How processes share the work: single, dp, ddp, fsdp or exact."),
    option(WHAT, "--set", "overrides", multiple=True, metavar="FIELD=VALUE",
           shell_complete=completers.fields,
           help="Set a field of job.yaml, for example train.epochs=3; repeatable."),
    option_option,
    option(WHERE, "-e", "--env", "environment", multiple=True, metavar="NAME[=VALUE]",
           help="Set a variable for every worker; repeatable."),
    option(MORE, "--max-restarts", metavar="N", help="Restarts of failed workers."),
    option(MORE, "--profile", metavar="steps=A:B[,ranks=N]",
           help="Record these steps with torch.profiler on these ranks, by default rank 0."),
)  # fmt: skip
_JOB_OPTIONS = (
    option(WHAT, "--trainer", metavar="NAME", shell_complete=completers.trainers,
           help="Training loop: native (dtrain's), or lightning."),
    option(WHAT, "--seed", metavar="N", help="Seed of the whole training."),
    option(WHAT, "--name", metavar="TEXT", help="Name of the run."),
    option(WHERE, "--launcher", show_default="local", metavar="NAME",
           shell_complete=completers.profiles,
           help="Where processes start: local, torchrun, slurm, ray, or a profile of your own."),
    option(WHAT, "--copy", metavar="RUN", shell_complete=completers.runs,
           help="Instead of JOB: the job and options of a run, changed by flags."),
    option(MORE, "--inject", "inject", multiple=True, metavar="RANK,STEP,KIND",
           help="Cause a fault, for example rank=1,step=5,kind=flip-gradient-bit."),
    option(MORE, "--run-id", metavar="ID",
           help="Id of the run; needed where several hosts start the same run."),
)  # fmt: skip


_OF_LAUNCHER = "launcher_option_"
"""The prefix of the names of arguments that are options of a launcher."""


def _click_option(flag: Flag) -> Callable[[_Function], _Function]:
    return option(
        f"Launcher {flag.launcher}",
        *flag.names,
        f"{_OF_LAUNCHER}{flag.option}",
        metavar=flag.metavar,
        help=flag.help,
        callback=_with_unit(flag.unit) if flag.unit else None,
    )


def _with_unit(unit: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    return lambda _context, _option, text: f"{text}{unit}" if text and text.isdecimal() else text


class LaunchCommand(Command):
    """A command that also takes the flags of external launchers.

    They are looked up only for an unknown flag or for help: that takes 0.1 s.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        """Take click's arguments. As with torchrun, `--nproc_per_node` is `--nproc-per-node`."""
        super().__init__(*args, **more)
        self.context_settings["token_normalize_func"] = lambda name: name.replace("_", "-")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        if {"--help", "-h"} & {*args} and "--launcher" in " ".join(args):
            self._add_outside()
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not self._add_outside():
                raise self._answer(error, given) from None
        try:
            return super().parse_args(ctx, given)
        except click.NoSuchOption as error:
            raise self._answer(error, given) from None

    def _add_outside(self) -> bool:
        known = {param.name for param in self.params}
        for each in flags.external_flags():
            if f"{_OF_LAUNCHER}{each.option}" not in known:
                _click_option(each)(self)
        return len(self.params) > len(known)

    def _answer(
        self, error: click.NoSuchOption, given: list[str]
    ) -> click.NoSuchOption | UsageError:
        """Return the error for an option of the script or of torchrun, with what to write."""
        from dtrain.cli import torchrun

        job, name, ctx = self._job_at(given), error.option_name, error.ctx
        found = [n for n, text in enumerate(given) if text.replace("_", "-").startswith(name)]
        if not found or ctx is None:
            return error
        if job is None or found[0] < job:
            return torchrun.answer(name, given, job, ctx.command_path) or error
        if not given[job].endswith(".py") and not {"-m", "--module", "--no-python"} & {*given}:
            return error
        line = shlex.join([*given[: found[0]], "--", *given[found[0] :]])
        return UsageError(
            f"{name} is not an option of dtrain. Put -- before the arguments of the script:\n"
            f"  {ctx.command_path} {line}",
            code="usage.option-of-script",
        )

    def _job_at(self, given: list[str]) -> int | None:
        """Return the position of JOB: the first word that is no option and no option's value."""
        from dtrain.launchers.torchrun_options import ANSWERS

        options = [each for each in self.params if isinstance(each, click.Option)]
        with_value = {name for each in options if not each.is_flag for name in each.opts}
        with_value |= {name for name, each in ANSWERS.items() if each.has_value}
        is_value = False
        for number, text in enumerate(given):
            if not is_value and not text.startswith("-"):
                return number
            is_value = not is_value and text.replace("_", "-") in with_value
        return None


def launcher_flags(*names: str) -> Callable[[_Function], _Function]:
    """Add the flags of these options of launchers."""

    def added(function: _Function) -> _Function:
        for each in reversed(flags.FLAGS):
            if each.option in names:
                function = _click_option(each)(function)
        return function

    return added


def size_options(function: _Function) -> _Function:
    """Add the options for the size of a launch, used by launch, plan and resume."""
    for each in reversed((*_SIZE_OPTIONS, runs_option, *map(_click_option, flags.FLAGS))):
        function = each(function)
    return function


def job_options(function: _Function) -> _Function:
    """Add the options that only a new run has, used by launch and plan."""
    for each in reversed((*_PROGRAM_OPTIONS, *_JOB_OPTIONS)):
        function = each(function)
    return size_options(function)


def job_of(job: str | None, options: dict[str, Any]) -> Job:
    """Return the job that JOB or `--copy` names.

    It is a path, a run, or with -m or --no-python a job without a file.
    """
    from dtrain.planning import job_of_program

    copied = options["copy"]
    if copied is not None:
        if job is not None or options["module"] or options["no_python"]:
            text = f"--copy {copied} stands for JOB, but JOB is also given"
            raise UsageError(text, code="usage.unexpected-argument")
        return find(copied, options["runs"])
    if job is None:
        raise click.MissingParameter(param_type="argument", param_hint="JOB")
    if options["module"] and options["no_python"]:
        text = "-m and --no-python cannot be used together: a module is Python"
        raise UsageError(text, code="usage.flag-without-effect")
    if options["module"]:
        return job_of_program("module", job)
    return job_of_program("command", job) if options["no_python"] else job


def request(options: dict[str, Any]) -> Request:
    """Return the request of a command: all options except the job."""
    from dtrain.planning import Request

    if options.get("standalone") and options["launcher"] not in (None, "local"):
        text = f"--standalone is launcher local, and the launcher here is {options['launcher']!r}"
        raise UsageError(text, code="usage.flag-without-effect")
    return Request(
        launcher=options.get("launcher"),
        runs=options["runs"],
        run_id=options.get("run_id"),
        overrides=options["overrides"],
        fields=written_flags(options),
        options=_launcher_options(options),
        further_options=options["options"],
        preflight=options.get("preflight", False),
    )


def given_launcher_options(options: dict[str, Any]) -> dict[str, str]:
    """Return the options of launchers that flags have given, by name."""
    return {
        option: value
        for name, value in options.items()
        if value and (option := name.removeprefix(_OF_LAUNCHER)) != name
    }


def _launcher_options(options: dict[str, Any]) -> dict[str, Located]:
    from dtrain.job.load import flag

    given = given_launcher_options(options)
    return {name: flag(f"--{name.replace('_', '-')}", value) for name, value in given.items()}


def written_flags(options: dict[str, Any]) -> dict[str, Any]:
    """Return the given flags as fields of job.yaml, with the flag's spelling for errors."""
    from dtrain.job.load import flag
    from dtrain.planning import FIELDS

    options = _counted(options)
    written = {
        field: flag(f"--{name.replace('_', '-')}", _number(options[name]))
        for name, field in FIELDS.items()
        if options.get(name) is not None
    }
    if options.get("script_args"):
        written["script_args"] = flag("--", list(options["script_args"]))
    if options.get("inject"):
        written["checks.inject"] = flag("--inject", list(options["inject"]))
    if options.get("profile"):
        written |= _profile_fields(options["profile"])
    for text in options["environment"]:
        name, equals, value = text.partition("=")
        if not equals:
            if name not in os.environ:
                text = f"--env {name}: not set here; write --env {name}=VALUE"
                raise UsageError(text, code="usage.variable-not-set")
            value = os.environ[name]
        written[f"launch.env.{name}"] = flag(f"--env {name}", value)
    return written


def _profile_fields(text: str) -> dict[str, Any]:
    """Return the fields that `--profile` sets. A part without a name is a further rank."""
    from dtrain.job.load import flag

    parts: dict[str, list[str]] = {}
    name = ""
    for part in text.split(","):
        before, equals, value = part.partition("=")
        name = before.strip() if equals else name
        if name not in ("steps", "ranks") or (name == "steps" and name in parts):
            example = "write it like steps=10:15,ranks=0,1"
            raise UsageError(f"--profile {text}: {example}", code="usage.invalid-value")
        parts.setdefault(name, []).append((value if equals else part).strip())
    fields: dict[str, Any] = {f"profile.{name}": list(map(_number, parts[name])) for name in parts}
    if "profile.steps" in fields:
        (fields["profile.steps"],) = fields["profile.steps"]
    if fields.get("profile.ranks") == ["all"]:
        fields["profile.ranks"] = "all"
    return {field: flag(f"--profile {text}", value) for field, value in fields.items()}


def _counted(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the number of processes that `--procs auto` means on this host.

    With one process per GPU, it is the number of GPUs. The words are those of torchrun.
    """
    word = options.get("procs")
    if word not in ("gpu", "cpu", "auto"):
        return options
    if options.get("launcher") not in (None, "local", "torchrun"):
        text = f"--procs {word} counts what this host has; give the number for the nodes of others"
        raise UsageError(text, code="usage.invalid-value")
    from dtrain.doctor import gpus

    found = gpus.usable(os.environ.get(gpus.VISIBLE), gpus.installed())
    if word == "cpu" or (word == "auto" and not found):
        return {**options, "procs": str(len(os.sched_getaffinity(0)))}
    if not found:
        text = f"--procs gpu: this host shows {'no' if found == 0 else 'no known number of'} GPUs"
        raise UsageError(f"{text}; give a number of processes", code="plan.too-few-gpus")
    return {**options, "procs": None, "gpus": options.get("gpus") or str(found)}


def _number(text: str) -> Any:
    from dtrain.job.units import is_number

    return int(text) if is_number(text.removeprefix("-")) else text


def print_json(value: Any) -> None:
    from dtrain.plainjson import to_json

    click.echo(to_json(value, indent=2))
