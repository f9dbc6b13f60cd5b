"""Options that several commands share, and how they become a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtrain.cli.run_lookup import find, job_dir_of

if TYPE_CHECKING:
    from dtrain.job.load import LoadedJob
    from dtrain.job.profile import LoadedProfile
    from dtrain.plan import LaunchPlan
    from dtrain.run.rundir import RunDir

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

# option → the field of job.yaml that it sets
_FIELDS = {
    "nodes": "launch.nodes",
    "gpus": "launch.gpus_per_node",
    "procs": "launch.procs_per_node",
    "max_restarts": "launch.max_restarts",
    "strategy": "strategy",
    "trainer": "trainer",
    "seed": "seed",
    "name": "name",
}
_LAUNCHER_OPTIONS = (
    "node_rank", "rdzv_endpoint", "partition", "account", "time", "slurm", "after",
    "address", "ray",
)  # fmt: skip

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
    click.option("--node-rank", metavar="K", help="Launcher torchrun: which node this host is."),
    click.option("--rdzv-endpoint", metavar="HOST:PORT",
                 help="Launcher torchrun: where node 0 listens."),
    click.option("-p", "--partition", metavar="NAME", help="Launcher slurm: partition."),
    click.option("-A", "--account", metavar="NAME", help="Launcher slurm: account."),
    click.option("-t", "--time", metavar="TIME", help="Launcher slurm: time limit, as 4h."),
    click.option("--slurm", multiple=True, metavar="FLAG=VALUE",
                 help="Launcher slurm: any other flag of sbatch, as nice=100; may be repeated."),
    click.option("--after", metavar="RUN",
                 help="Launcher slurm: start when the job of that run has succeeded."),
    click.option("--address", metavar="HOST:PORT", help="Launcher ray: a running cluster."),
    click.option("--ray", multiple=True, metavar="OPTION=VALUE",
                 help="Launcher ray: any option of its profile, as relaunch=5; may be repeated."),
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


def size_options(function: _Function) -> _Function:
    """Options that say how large a launch is; for launch, plan and resume."""
    for option in reversed((*_SIZE_OPTIONS, runs_option)):
        function = option(function)
    return function


def job_options(function: _Function) -> _Function:
    """Options that only a new run has; for launch and plan."""
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return size_options(function)


@dataclass(frozen=True)
class Prepared:
    """A plan and what it was made of."""

    plan: LaunchPlan
    job: LoadedJob
    profile: LoadedProfile


def prepare(job_path: str, options: dict[str, Any]) -> Prepared:
    """Job file and flags → a plan for a new run.

    Raises:
        JobError: job, profile or flags are wrong.
        PlanError: they do not go together.
    """
    from dtrain.errors import UsageError, quoted
    from dtrain.job.load import load_job
    from dtrain.job.profile import load_profile
    from dtrain.job.script import job_of_script
    from dtrain.run import ids

    job_dir = Path(job_path).absolute().parent
    profile = load_profile(options["launcher"], job_dir)
    job = load_job(
        job_path,
        options["overrides"],
        profile.launch,
        written_flags(options),
        text=job_of_script(job_path),
    )
    given = options["run_id"]
    run_id = ids.new(job.spec.name) if given is None else given
    if problem := ids.problem(run_id):
        raise UsageError(f"--run-id {quoted(run_id)} cannot be the id of a run: {problem}")
    plan = make(job, profile, options, run_id=run_id, runs=options["runs"], job_dir=job_dir)
    return Prepared(plan, job, profile)


def prepare_again(run: RunDir, options: dict[str, Any]) -> Prepared:
    """An existing run and flags → a plan for its next attempt; errors as for `prepare`."""
    from dtrain.job.load import load_job
    from dtrain.job.profile import load_profile
    from dtrain.launchers import base
    from dtrain.plan import LaunchPlan
    from dtrain.run import events

    before = LaunchPlan.read(run)
    job_dir = job_dir_of(before)
    profile = load_profile(before.profile, job_dir)
    inherited = events.accepted_job(run)
    job = load_job(inherited, options["overrides"], {}, written_flags(options), job_dir=job_dir)
    job = base.with_secrets(job, run)
    given = {k: v for k, v in options.items() if v is not None and (v or k not in before.options)}
    options = {**before.options, **given}
    options["ray"] = (*_kept(before, "--ray"), *options.get("ray", ()))
    plan = make(
        job,
        profile,
        options,
        run_id=run.id,
        runs=before.run_url.rpartition("/")[0] or run.path.parent,
        job_dir=job_dir,
        attempt=base.next_attempt(run),
    )
    return Prepared(plan, job, profile)


def make(
    job: LoadedJob,
    profile: LoadedProfile,
    options: dict[str, Any],
    *,
    run_id: str,
    runs: str | os.PathLike[str],
    job_dir: Path,
    attempt: int = 0,
) -> LaunchPlan:
    """A plan complete with its commands; `PlanError` when the parts do not go together."""
    from dtrain.errors import PlanError
    from dtrain.job.imports import refuse_missing
    from dtrain.job.static_source import task_imports
    from dtrain.launchers import base
    from dtrain.plan import Facts, make_plan

    given = {name: options[name] for name in _LAUNCHER_OPTIONS if options.get(name)}
    launcher = base.load(profile.spec.launcher)
    if profile.spec.launcher in ("local", "torchrun"):  # others may have another Python
        refuse_missing(job.spec, job_dir)
    settings, sources = _settings(launcher, profile, given, runs)
    sources |= _sizes_from(job)
    facts = Facts.gather(
        run_id, runs, attempt, task_imports(job.spec.script or job.spec.task, job_dir)
    )
    try:
        plan = make_plan(
            job.spec,
            job_dir=str(job_dir),
            launcher=profile.spec.launcher,
            profile=profile.name,
            options=settings,
            facts=facts,
            sources=sources,
        )
    except PlanError as error:
        raise error.placed(job.sources) from None
    return launcher.complete(plan, facts)


def _settings(
    launcher: Any, profile: LoadedProfile, given: dict[str, Any], runs: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The launcher's own options, checked where it says how, and where they were written."""
    from dtrain.job.load import flag
    from dtrain.job.profile import checked_options

    model = getattr(launcher, "options_model", None)
    if model is None:
        return {**profile.spec.options, **given}, {}
    aside = ("after", "ray")
    flags = {name: flag(f"--{name}", value) for name, value in given.items() if name not in aside}
    for text in given.get("ray", ()):
        flags |= _option_of_profile("--ray", text)
    if "slurm" in given and not isinstance(given["slurm"], dict):
        flags["slurm"] = flag("--slurm", _flags_of_sbatch(given["slurm"]))
    if "after" in given:
        dependency = launcher.dependency_on(find(given["after"], str(runs)))
        if dependency:
            flags["dependency"] = flag(f"--after {given['after']}", dependency)
    options, sources = checked_options(profile, flags, model)
    return options.model_dump(mode="json"), sources


def _option_of_profile(spelling: str, text: str) -> dict[str, Any]:
    """`relaunch=5` as the option of a profile that it sets; the value is YAML."""
    from dtrain.errors import JobError
    from dtrain.job.located import Located, SourceLocation
    from dtrain.job.yaml_reader import read_yaml

    name, _, value = text.partition("=")
    place = SourceLocation(f"{spelling} {name}")
    written, problems = read_yaml(value, lambda _: place)
    if problems:
        raise JobError(problems)
    return {name: written or Located(None, place)}


def _kept(before: LaunchPlan, spelling: str) -> tuple[str, ...]:
    """What `_option_of_profile` was given when a run was launched."""
    import json

    places = {name: before.sources.get(name, "") for name in before.options}
    names = [name for name, place in places.items() if place.startswith(f"{spelling} ")]
    return tuple(f"{name}={json.dumps(before.options[name])}" for name in names)


def _flags_of_sbatch(texts: Iterable[str]) -> dict[str, Any]:
    """`nice=100` → {nice: 100}; `exclusive` → {exclusive: True}; a list of what is given again."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        found.setdefault(name, []).append(value if equals else True)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _sizes_from(job: LoadedJob) -> dict[str, str]:
    """Where the numbers of nodes and GPUs were written."""
    fields = {"nodes": "launch.nodes", "gpus": "launch.gpus_per_node"}
    return {name: job.sources.get(field, "default") for name, field in fields.items()}


def written_flags(options: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as fields of job.yaml with the flag's spelling for errors."""
    from dtrain.job.load import flag

    flags = {
        field: flag(f"--{name.replace('_', '-')}", _number(options[name]))
        for name, field in _FIELDS.items()
        if options.get(name) is not None
    }
    if options.get("arguments"):
        flags["arguments"] = flag("--", list(options["arguments"]))
    if options.get("inject"):
        flags["checks.inject"] = flag("--inject", list(options["inject"]))
    for text in options["environment"]:
        name, equals, value = text.partition("=")
        if not equals:
            if name not in os.environ:
                raise click.UsageError(f"--env {name}: not set here; write --env {name}=VALUE")
            value = os.environ[name]
        flags[f"launch.env.{name}"] = flag(f"--env {name}", value)
    return flags


def _number(text: str) -> Any:
    from dtrain.job.units import is_number

    return int(text) if is_number(text.removeprefix("-")) else text


def print_json(value: Any) -> None:
    """Print indented JSON."""
    from dtrain.plainjson import to_json

    click.echo(to_json(value, indent=2))
