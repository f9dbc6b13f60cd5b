"""Make a sweep: plan each of its runs and write their directories, but start none."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dtrain import environ
from dtrain.errors import UsageError
from dtrain.launch_plan import Element
from dtrain.launchers import prepare
from dtrain.launchers.base import ArrayCapable, Shareable
from dtrain.planning import Job, Prepared, Request, plan_run
from dtrain.run.attempts import Handle
from dtrain.run.remote import runs as remote
from dtrain.run.remote.mirror import LAUNCH
from dtrain.run.rundir import RunDir
from dtrain.sweeping.sweep import Sweep
from dtrain.sweeping.values import Values


def plan(job: Job, choices: Sequence[Values], request: Request) -> list[Prepared]:
    """Plan each run of a sweep. The errors are those of `plan_run`, for the first wrong one.

    Args:
        job: the job of all runs.
        choices: the values of each run.
        request: the options of all runs. Its `run_id` is the id of the sweep.

    Raises:
        UsageError: the launcher can start one run at a time only.
    """
    found: list[Prepared] = []
    for index, values in enumerate(choices):
        element = Element(request.run_id or "", index, len(choices), _shown(values))
        asked = replace(request, fields={**request.fields, **values}, suffix=f"-{index}")
        prepared = plan_run(job, replace(asked, sweep=element))
        if request.run_id is None:  # all runs have the id that the first one was given
            request = replace(request, run_id=prepared.plan.run_id.removesuffix(f"-{index}"))
            element = replace(element, sweep=request.run_id or "")
            prepared = replace(prepared, plan=replace(prepared.plan, sweep=element))
        if not isinstance(prepared.launcher, ArrayCapable | Shareable):
            raise UsageError(
                f"launcher {prepared.plan.launcher!r} starts one run at a time, so that it has no "
                "--sweep; launchers local, slurm and ray have",
                code="usage.sweep-unsupported",
            )
        found.append(prepared)
    return found


def write(planned: Sequence[Prepared], detach: bool) -> Sweep:
    """Write the directories of all runs. They are prepared then, and wait to be started.

    Raises:
        UsageError: there is already such a run, or the launcher cannot `detach`.
        PlanError: this host lacks something.
        LaunchError: a directory cannot be written. No run is left then.
    """
    written: list[RunDir] = []
    for each in planned:
        each.refuse_unlaunchable(detach)
        if each.plan.run.resolved.exists():
            raise UsageError(
                f"run {each.plan.run_id} exists; give another --run-id", code="run.exists"
            )
    try:
        for each in planned:
            written.append(each.plan.run)
            prepare.prepare(each.plan, each.job.spec, each.job.text)
            each.plan.run.remove_secrets(each.plan.attempt)  # written again when the run starts
            if each.plan.run_url:
                remote.push(each.plan.run, LAUNCH)
    except BaseException:
        remove(written)
        raise
    elements = [each.plan.sweep for each in planned if each.plan.sweep is not None]
    return Sweep(elements[0].sweep, written, elements)


def remove(runs: Sequence[RunDir]) -> None:
    """Remove the runs of a refused sweep: those that never had a job or a worker."""
    for run in runs:
        handle = Handle.read(run)
        if (handle is None or handle.job_id is None) and not run.rank_logs(0):
            shutil.rmtree(run.path, ignore_errors=True)


def _shown(values: Values) -> dict[str, Any]:
    """Return the values as anyone may see them.

    Raises:
        UsageError: one is the value of a secret variable.
    """
    shown: dict[str, Any] = {}
    for field, value in values.items():
        name = field.rpartition(".")[2]
        shown[field] = environ.shown(name, value.plain())
        if field.startswith("launch.env.") and environ.secret({name: str(value.plain())}):
            raise UsageError(
                f"--sweep {field}: the values of secret variables are not kept in the directories "
                "of runs, so that they cannot be swept",
                code="usage.sweep-secret",
            )
    return shown
