"""What `dtrain doctor` finds: the checks of this host, of a job and of its cluster."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.codes import CODES
from dtrain.doctor.asked import Asked, checkpoint_bytes
from dtrain.doctor.checks import ALONE_CHECKS, HOST_CHECKS, data, run_checks
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis
from dtrain.environ import inherited_env
from dtrain.errors import JobError, PlanError
from dtrain.job.located import shown_path
from dtrain.launchers.base import Diagnosing, HostChecking
from dtrain.planning import Job, Prepared, Request, job_of_program, plan_run
from dtrain.run.failures import describe_exit
from dtrain.run.remote.runs import staging
from dtrain.run.remote.store import is_url
from dtrain.run.rundir import list_runs
from dtrain.words import counted

_IMPORT_S = 120
_MOST_RUNS = 10
_OF_TRAINING = {"cores", "numa", "gpus", "driver", "shm", "ulimits"}
"""Checks of a host that trains. A login node needs none of this."""


def diagnose(job: Job | None, request: Request) -> Iterator[Diagnosis]:
    """Yield what each check finds, as soon as it is known.

    Args:
        job: the job, as for `plan_run`. None checks this host, or the cluster of a profile.
        request: the options of its launch.

    Raises:
        UsageError: an option is unknown or has an invalid value.
    """
    prepared, found = _plan(job, request)
    trains_here = prepared is None or isinstance(prepared.launcher, HostChecking)
    with _importing(prepared) as process:
        yield from found
        runs = staging(request.runs) if is_url(request.runs) else Path(request.runs).absolute()
        asked = Asked(runs)
        if prepared is not None:
            spec = prepared.job.spec
            asked = replace(
                Asked.of(prepared.plan, spec),
                checkpoint_bytes=_earlier_checkpoint(runs, spec.name),
            )
            if spec.data.paths:
                yield data(spec, Path(prepared.plan.job_dir))
        checks = {**HOST_CHECKS, **ALONE_CHECKS}
        left_out = set() if trains_here else _OF_TRAINING
        if is_url(request.runs):
            left_out = left_out | {"shared"}
        kept = {name: check for name, check in checks.items() if name not in left_out}
        yield from run_checks(kept, asked)
        if prepared is not None and isinstance(prepared.launcher, Diagnosing):
            yield prepared.launcher.diagnose(prepared.plan)
        yield from _imports(process, _classes(prepared), trains_here)


def _plan(job: Job | None, request: Request) -> tuple[Prepared | None, list[Diagnosis]]:
    """Return the plan of a launch, and what was found while it was made.

    Without a job it is that of a command, to ask a cluster about. This host alone needs none.
    """
    flags = (request.fields, request.overrides, request.options, request.further_options)
    if job is None and request.launcher in (None, "local") and not any(flags):
        return None, []
    try:
        prepared = plan_run(job or job_of_program("command", "true"), request)
    except (JobError, PlanError) as error:
        return None, [
            Diagnosis("plan", PROBLEM, message, CODES[code].remedy if code in CODES else "", code)
            for message, code in error.parts()
        ]
    plan = prepared.plan
    if short := prepared.lacking:
        code = "plan.too-few-gpus"
        return prepared, [Diagnosis("plan", PROBLEM, short, CODES[code].remedy, code)]
    what = f"{plan.trainer} × {plan.strategy} × {plan.launcher}, world size {plan.world_size}"
    return prepared, [Diagnosis("plan", OK, what)] if job else []


def _earlier_checkpoint(runs: Path, name: str) -> int:
    """Return the size of the newest checkpoint of an earlier run of the same job; 0 without one."""
    same = [run for run in list_runs(runs) if run.id.rpartition("-")[0] == name]
    return next(filter(None, map(checkpoint_bytes, same[: -_MOST_RUNS - 1 : -1])), 0)


def _classes(prepared: Prepared | None) -> list[str]:
    """Return the references of the classes that the job names. A script is not imported."""
    if prepared is None or prepared.job.spec.program is not None:
        return []
    spec = prepared.job.spec
    return [each for each in (spec.task, spec.lightning.data_module) if each]


@contextlib.contextmanager
def _importing(prepared: Prepared | None) -> Iterator[subprocess.Popen[str]]:
    """Import torch and the job's classes in a process of their own, beside the other checks."""
    folder = "." if prepared is None else prepared.plan.job_dir
    own = [sys.executable, "-P", "-m", "dtrain.train.doctor", str(os.getpid())]
    env = inherited_env() | ({} if prepared is None else prepared.job.spec.launch.env)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*own, folder, *_classes(prepared)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        errors="replace",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _imports(
    process: subprocess.Popen[str], classes: list[str], trains_here: bool
) -> Iterator[Diagnosis]:
    """Yield the result of each import."""
    try:
        output, errors = process.communicate(timeout=_IMPORT_S)
    except subprocess.TimeoutExpired:
        fact = f"the import has not ended after {_IMPORT_S} s"
        yield Diagnosis("task", PROBLEM, fact, "move what takes long into the methods of the task")
        return
    found = [json.loads(line) for line in output.splitlines()]
    yield from (_of_import(each, trains_here) for each in found)
    if len(found) <= len(classes) and not any("error" in each for each in found):
        ended = describe_exit(process.returncode)
        last = (errors.strip().splitlines() or ["it has written nothing"])[-1]
        what = classes[len(found) - 1] if found else "torch"
        fact = f"the process that imports {what} {ended}: {last}"
        remedy = f"{sys.executable} -c 'import torch' shows more"
        if found:
            remedy = "remove from its module what ends the process"
        yield Diagnosis("task" if found else "torch", PROBLEM, fact, remedy)


def _of_import(found: dict[str, Any], trains_here: bool) -> Diagnosis:
    check = "torch" if found["name"] == "torch" else "task"
    if "error" not in found:
        what = found["name"]
        if check == "torch":
            gpus = counted(found["gpus"], "GPU") if found["gpus"] else "no GPU"
            what = f"torch {found['version']} sees {gpus}"
            return Diagnosis(check, OK, f"{what}; imported in {found['seconds']:.1f} s")
        return Diagnosis(check, OK, f"{what} was imported in {found['seconds']:.1f} s")
    file, _, line = found["where"].rpartition(":")
    where = f"{shown_path(Path(file))}:{line}: " if file else ""
    remedy = "correct the file at this line"
    if found["is_missing_module"]:
        remedy = f"install the module for {sys.executable}: it is the Python of this command"
    # the nodes of a cluster may have another Python
    is_certain = trains_here or not found["is_missing_module"]
    return Diagnosis(check, PROBLEM if is_certain else WARNING, where + found["error"], remedy)
