"""Planning: makes a complete plan from a job file, a profile and the options of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dtrain import environ
from dtrain.errors import DamagedError, JobError, PlanError, UsageError, quoted
from dtrain.job.imports import installed_imports, refuse_missing
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.load import LoadedJob, flag, load_job
from dtrain.job.located import Located, SourceLocation, shown_path
from dtrain.job.profile import LoadedProfile, checked_options, load_profile, parse_options
from dtrain.job.script import PROGRAMS, job_of_script
from dtrain.job.spec import JobSpec
from dtrain.job.static_check import similar
from dtrain.job.yaml_reader import dump_yaml
from dtrain.launch_plan import Element, Facts, LaunchPlan, make_plan
from dtrain.launchers import base, status
from dtrain.launchers.base import Dependable, HostChecking, Launcher, Surveying
from dtrain.launchers.flags import FLAGS
from dtrain.launchers.supervise import can_detach
from dtrain.run import code_archive, events, files, ids
from dtrain.run.lookup import find
from dtrain.run.remote.runs import download_code
from dtrain.run.remote.store import is_url
from dtrain.run.rundir import RunDir

FIELDS = {
    "nodes": "launch.nodes",
    "gpus": "launch.gpus_per_node",
    "procs": "launch.procs_per_node",
    "max_restarts": "launch.max_restarts",
    "strategy": "strategy",
    "trainer": "trainer",
    "seed": "seed",
    "name": "name",
}
"""A flag, or an argument of `dtrain.launch` → the field of job.yaml that it sets."""


@dataclass(frozen=True)
class Request:
    """The options of a launch that are not in the job: from flags, or from a caller."""

    launcher: str | None = None
    """The name of a profile. None means `local`, or of a run that exists its own."""
    runs: str = "runs"
    """The directory or URL of all runs."""
    run_id: str | None = None
    """The run's id. None means a new one, made from the job's name."""
    suffix: str = ""
    """A suffix of the id, for a command that makes several runs."""
    overrides: Sequence[str] = ()
    """Values of --set: `FIELD=VALUE`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of job.yaml that flags set, with the flag's spelling."""
    options: Mapping[str, Located] = field(default_factory=dict)
    """Options of the launcher that have their own flag, and `after`, with the flag's spelling."""
    further_options: Sequence[str] = ()
    """Values of -o: `NAME=VALUE` of any options of the launcher."""
    preflight: bool = False
    """Whether the nodes check themselves and one another before the workers start."""
    sweep: Element | None = None
    """The place of a new run in its sweep."""
    cores: int | None = None
    """The number of this host's cores that the run may use. None means all."""


@dataclass(frozen=True)
class JobWithoutFile:
    """The job of a Python class, a module or a command, for which there is no job.yaml."""

    values: Mapping[str, Any]
    """Fields of job.yaml. The fields of the request are among them, with their own locations."""
    folder: Path
    """The directory that replaces that of job.yaml."""
    place: str
    """The name of the job in errors: `launch(Digits)` or `-m`."""

    def load(self, request: Request, profile: LoadedProfile) -> LoadedJob:
        given = ("name", "task", *PROGRAMS)
        own = {name: self.values[name] for name in given if name in self.values}
        root = Located.of(own, SourceLocation(self.place))
        return load_job(
            self.place,
            request.overrides,
            profile.launch,
            request.fields,
            job_dir=self.folder,
            text=dump_yaml(self.values),
            root=root,
        )


def job_of_program(kind: Literal["module", "command"], name: str) -> JobWithoutFile:
    """Return the job of a module, or of a program that need not be Python.

    Args:
        kind: the field of job.yaml that names it.
        name: the module's dotted name, or the program's name or path from the current directory.
    """
    title = Path(name).stem if kind == "command" else name.removesuffix(".__main__")
    value = name if kind == "module" else [name]
    place = "-m" if kind == "module" else "--no-python"
    return JobWithoutFile({"name": title.rpartition(".")[2], kind: value}, Path.cwd(), place)


@dataclass(frozen=True)
class Prepared:
    """A plan and its inputs."""

    plan: LaunchPlan
    launcher: Launcher
    job: LoadedJob
    profile: LoadedProfile

    @property
    def lacking(self) -> str:
        """The reason why this host cannot run the plan; empty if it can, or others run it."""
        return self.launcher.lacking(self.plan) if isinstance(self.launcher, HostChecking) else ""

    def refuse_unlaunchable(self, detach: bool) -> None:
        """Refuse a plan that can be planned here but not launched from here.

        Raises:
            PlanError: this host lacks something.
            UsageError: the launcher cannot `detach`.
        """
        if short := self.lacking:
            raise PlanError(short, ("launch.gpus_per_node",), code="plan.too-few-gpus").placed(
                self.job.sources
            )
        if detach and not can_detach(self.launcher, self.plan):
            raise UsageError(
                f"launcher {self.plan.launcher!r} cannot --detach: its processes end with the "
                "command; launcher 'slurm' can, and launcher 'ray' with -o submit=job",
                code="usage.detach-unsupported",
            )


Job = str | JobWithoutFile | RunDir
"""The path of a job file or a script, a job for which there is no file, or a run to copy."""


def plan_run(job: Job, request: Request) -> Prepared:
    """Plan a new run.

    Args:
        job: path of a job file or a script, a job for which there is no file, or a run whose job
            and options are used again, with the code as it is now.
        request: the options that are not in the job.

    Raises:
        JobError: job, profile or flags are wrong.
        PlanError: they do not work together.
    """
    if isinstance(job, RunDir):
        again = _Again.of(job, request)
        return _new_run(
            again.job, again.profile, request, again.job_dir, again.options, again.set_before
        )
    launcher = request.launcher or "local"
    if isinstance(job, JobWithoutFile):
        profile = load_profile(launcher, job.folder)
        return _new_run(job.load(request, profile), profile, request, job.folder)
    job_dir = Path(job).absolute().parent
    profile = load_profile(launcher, job_dir)
    text = job_of_script(job)
    loaded = load_job(job, request.overrides, profile.launch, request.fields, text=text)
    return _new_run(loaded, profile, request, job_dir)


def _new_run(
    job: LoadedJob,
    profile: LoadedProfile,
    request: Request,
    job_dir: Path,
    before: Mapping[str, Located] | None = None,
    set_before: Mapping[str, Any] | None = None,
) -> Prepared:
    run_id = ids.new(job.spec.name) if request.run_id is None else request.run_id
    run_id += request.suffix
    if problem := ids.problem(run_id):
        raise UsageError(
            f"--run-id {quoted(run_id)} cannot be the id of a run: {problem}", code="usage.run-id"
        )
    runs = request.runs
    return _planned(job, profile, request, before or {}, run_id, runs, job_dir, 0, set_before)


def plan_attempt(run: RunDir, request: Request) -> Prepared:
    """Plan the next attempt of a run; errors as for `plan_run`."""
    again = _Again.of(run, request)
    return _planned(
        again.job,
        again.profile,
        replace(request, sweep=again.sweep),
        again.options,
        run.id,
        again.runs,
        again.job_dir,
        status.next_attempt(run),
        again.set_before,
    )


@dataclass(frozen=True)
class _Again:
    """What a launch takes over from a run."""

    job: LoadedJob
    profile: LoadedProfile
    options: Mapping[str, Located]
    """The launcher's options that flags have set."""
    set_before: Mapping[str, Any]
    job_dir: Path
    runs: str | Path
    sweep: Element | None

    @classmethod
    def of(cls, run: RunDir, request: Request) -> _Again:
        """Read a run, and change what the request says. Another profile brings its own defaults."""
        before = LaunchPlan.read(run)
        job_dir = _job_dir_of(before)
        moves = request.launcher not in (None, before.profile)
        source = None if moves else f"run {run.id}"
        profile = load_profile(request.launcher or before.profile, job_dir, source)
        job = load_job(
            events.accepted_job(run),
            request.overrides,
            profile.launch if moves else {},
            request.fields,
            job_dir=job_dir,
            text=_without_profile(run, before) if moves else None,
        )
        stays = profile.spec.launcher == before.launcher
        return cls(
            _with_secrets(job, run),
            profile,
            _options_before(before) if stays else {},
            before.set_by_flags,
            job_dir,
            before.run_url.rpartition("/")[0] or run.path.parent,
            before.sweep,
        )


def _without_profile(run: RunDir, before: LaunchPlan) -> str:
    """Return the job of a run without what the profile of its launcher has set.

    It keeps what job.yaml and flags have set in section `launch`.
    """
    job = _section(files.read_text(events.accepted_job(run)) or "", run)
    own = _section(files.read_text(run.job) or "", run).get("launch") or {}
    flags = {name.split(".")[1] for name in before.set_by_flags if name.startswith("launch.")}
    kept = {*own, *flags}
    launch = {name: value for name, value in (job.get("launch") or {}).items() if name in kept}
    return dump_yaml({**job, "launch": launch})


def _job_dir_of(before: LaunchPlan) -> Path:
    """Return the directory of a run's job, or on a host that lacks it, the copy kept at the URL."""
    job_dir = Path(before.job_dir)
    if job_dir.is_dir() or not before.run_url:
        return job_dir
    download_code(before.run)
    unpacked = code_archive.unpack(before.run)
    if unpacked is None:
        raise UsageError(
            f"the job's directory {job_dir} is not on this host, and the URL has no copy of it",
            code="run.code-gone",
        )
    return unpacked


def _with_secrets(job: LoadedJob, run: RunDir) -> LoadedJob:
    """Return a job read from resolved.yaml with its masked variables restored from job.yaml.

    Variables given by `--env` at launch are stored nowhere on disk and are left out. The user must
    give them again.
    """
    text = files.read_text(run.job) or ""
    given = _env_of(text, run)
    env = {
        name: str(given.get(name, value)) if value == environ.MASK else value
        for name, value in job.spec.launch.env.items()
        if value != environ.MASK or name in given
    }
    launch = job.spec.launch.model_copy(update={"env": env})
    return replace(job, spec=job.spec.model_copy(update={"launch": launch}), text=text)


def _env_of(text: str, run: RunDir) -> dict[str, Any]:
    launch = _section(text, run).get("launch") or {}
    env = launch.get("env") if isinstance(launch, dict) else None
    return dict(env) if isinstance(env, dict) else {}


def _section(text: str, run: RunDir) -> dict[str, Any]:
    """Return the content of a run's job file."""
    try:
        found = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DamagedError(str(run.job), "it is not a job file")
    return found


def _options_before(before: LaunchPlan) -> dict[str, Located]:
    """Return the launcher's options that flags set when the run was launched, except --after."""
    options = before.options.model_dump(mode="json")
    kept = Located({}, SourceLocation("-o"))
    for name, place in before.sources.items():
        head, _, entry = name.partition(".")
        if head not in options or not place.startswith("-") or place.startswith("--after "):
            continue
        value = options[head]
        if not isinstance(value, dict):
            kept = flag(place, value).nest((head,)).merge_over(kept)
        elif entry:
            kept = flag(place, value[entry]).nest((head, entry)).merge_over(kept)
    found: dict[str, Located] = kept.value
    return found


def _planned(
    job: LoadedJob,
    profile: LoadedProfile,
    request: Request,
    before: Mapping[str, Located],
    run_id: str,
    runs: str | os.PathLike[str],
    job_dir: Path,
    attempt: int = 0,
    set_before: Mapping[str, Any] | None = None,
) -> Prepared:
    launcher = base.load(profile.spec.launcher)
    if isinstance(launcher, HostChecking):  # others may have another Python, and other files
        refuse_missing(job.spec, job_dir)
        if attempt == 0:  # later ones may have checkpoints of their own
            _refuse_missing_weights(job)
    options, sources = _options(launcher, profile, request, before)
    sources |= _sizes_from(job)
    imports = installed_imports(job.spec, job_dir)
    facts = Facts.gather(run_id, runs, attempt, imports, request.cores)
    try:
        plan = complete_plan(job.spec, profile, launcher, job_dir, options, facts, sources)
    except PlanError as error:
        raise error.placed(job.sources) from None
    set_by_flags = {**(set_before or {}), **_set_by_flags(job)}
    plan = replace(
        plan, set_by_flags=set_by_flags, preflight=request.preflight, sweep=request.sweep
    )
    return Prepared(plan, launcher, job, profile)


def _refuse_missing_weights(job: LoadedJob) -> None:
    given = job.spec.checkpoint.init_from
    if given is None or is_url(given) or os.path.lexists(given):
        return
    path = Path(given)
    raise PlanError(
        f"no such file or directory: {shown_path(path)}{similar(path)}",
        ("checkpoint.init_from",),
        code="job.data-not-found",
    ).placed(job.sources)


def _set_by_flags(job: LoadedJob) -> dict[str, Any]:
    """Return the fields whose value a flag has given, by name, with secrets masked."""
    found: dict[str, Any] = {}
    for name, source in job.sources.items():
        value: Any = job.spec.to_plain() if source.startswith("--") else None
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        own = name.rpartition(".")[2]
        if name.startswith("launch.env.") and value is not None:
            found[name] = environ.masked({own: value})[own]
        elif value is not None:
            found[name] = environ.shown(own, value)
    return found


def complete_plan(
    spec: JobSpec,
    profile: LoadedProfile,
    launcher: Launcher,
    job_dir: Path,
    options: AnyOptions,
    facts: Facts,
    sources: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """Return a plan with everything that a launch does.

    Raises:
        PlanError: the parts do not work together.
    """
    options = launcher.options_model.of(options)
    if isinstance(launcher, Surveying):
        facts = launcher.survey(facts, options)
    plan = make_plan(
        spec,
        job_dir=str(job_dir),
        launcher=profile.spec.launcher,
        profile=profile.name,
        options=options,
        facts=facts,
        sources=sources,
    )
    return launcher.complete(plan, facts)


def _options(
    launcher: Launcher, profile: LoadedProfile, request: Request, before: Mapping[str, Located]
) -> tuple[AnyOptions, dict[str, str]]:
    """Return the launcher's own options, and where each was written.

    Args:
        launcher: the launcher of the profile.
        profile: the options of a launch without flags.
        request: its options override all others.
        before: options that flags set when the run was launched.
    """
    _refuse_flags_of_others(launcher, profile.spec.launcher, request.options)
    flags = {name: value for name, value in request.options.items() if name != "after"}
    further = parse_options(request.further_options, launcher.options_model)
    for name in flags.keys() & further.keys():
        raise JobError(
            [
                further[name].place.problem(
                    "", f"{flags[name].place.file} is also given", code="option.given-twice"
                )
            ]
        )
    if after := request.options.get("after"):
        assert isinstance(launcher, Dependable)
        dependency = launcher.dependency_on(find(after.value, request.runs))
        if dependency:
            flags["dependency"] = flag(f"--after {after.value}", dependency)
    location = SourceLocation(f"--launcher {profile.name}")
    given = Located({**flags, **further}, location).merge_over(Located(dict(before), location))
    return checked_options(profile, given.value, launcher.options_model)


def _refuse_flags_of_others(launcher: Launcher, name: str, given: Mapping[str, Located]) -> None:
    for each in FLAGS:
        is_valid = each.launcher == name or each.option in launcher.options_model.model_fields
        if each.option == "after" and isinstance(launcher, Dependable):
            is_valid = True
        if each.option in given and not is_valid:
            raise PlanError(
                f"{given[each.option].place.file} needs --launcher {each.launcher}; "
                f"the launcher here is {name!r}",
                code="usage.flag-of-other-launcher",
            )


def _sizes_from(job: LoadedJob) -> dict[str, str]:
    """Return where the numbers of nodes and GPUs were written."""
    fields = {"nodes": "launch.nodes", "gpus": "launch.gpus_per_node"}
    return {name: job.sources.get(field, "default") for name, field in fields.items()}
