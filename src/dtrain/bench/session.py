"""Makes the runs of `dtrain bench`, on any launcher, and reads what they have measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.bench.results import Bench, Measured, read_step
from dtrain.console.silent import Silent
from dtrain.errors import DtrainError, UsageError
from dtrain.job.load import flag
from dtrain.job.spec import JobSpec
from dtrain.launchers.supervise import drive
from dtrain.plainjson import to_json
from dtrain.planning import Job, JobWithoutFile, Prepared, Request, plan_run
from dtrain.run import files

OF_NODES = ("collectives", "links", "store")
OF_JOB = ("loader", "step")
PARTS = (*OF_NODES, *OF_JOB)
_MODULE = "dtrain.train.bench"
_NOTHING_ELSE: dict[str, Any] = {
    "train.epochs": None,
    "train.early_stopping": None,
    "eval.every_steps": None,
    "eval.every_epochs": None,
    "checkpoint.every_steps": None,
    "checkpoint.every_epochs": None,
    "checkpoint.every": None,
    "checks.inject": [],
    "log.loggers": [],
    "profile": None,
}
"""The fields of a job of which only the steps are measured."""


def bench(
    job: Job | None,
    request: Request,
    parts: Sequence[str],
    steps: int,
    say: Callable[[str], None],
) -> Bench:
    """Measure, with a launch for the nodes and the loader, and one for the steps of the job.

    Args:
        job: the job, as for `plan_run`. None measures only the nodes.
        request: the options of the launches.
        parts: the parts of `PARTS` to measure. Those of a job are left out without one.
        steps: the number of steps to train.
        say: called with the name of each run before it is launched.

    Raises:
        JobError, PlanError, UsageError: as for `plan_run`.
        DtrainError: a launch failed.
    """
    asked = None if job is None else plan_run(job, request)
    problems: dict[str, str] = {}
    wanted = [part for part in parts if asked is not None or part in OF_NODES]
    if asked is not None and asked.job.spec.program is not None:
        why = f"dtrain does not know the steps and the data of a {asked.job.spec.program}"
        problems = {part: why for part in wanted if part in OF_JOB}
    elif "loader" in wanted and asked is not None and asked.job.spec.trainer != "native":
        problems["loader"] = f"it is measured for trainer native, not {asked.job.spec.trainer}"
    wanted = [part for part in wanted if part not in problems]
    nodes = trained = None
    if of_nodes := [part for part in wanted if part != "step"]:
        nodes = _plan_of_nodes(asked, request, of_nodes)
    if "step" in wanted and job is not None:
        changed = {**_NOTHING_ELSE, "train.steps": steps}
        fields = {name: flag("bench", value) for name, value in changed.items()}
        trained = plan_run(job, replace(request, fields={**request.fields, **fields}))
    runs = [_run(prepared, say) for prepared in (nodes, trained) if prepared is not None]
    return Bench(
        runs,
        measured=None if nodes is None else files.read_as(Measured, nodes.plan.run.bench),
        step=None if trained is None else read_step(trained.plan.run),
        workers=None if asked is None else asked.job.spec.data.workers,
        problems=problems,
    )


def _plan_of_nodes(asked: Prepared | None, request: Request, parts: Sequence[str]) -> Prepared:
    """Plan the run that measures the nodes, with the launch of the job."""
    fields: dict[str, Any] = {}
    overrides = request.overrides
    order: dict[str, Any] = {"parts": parts}
    folder = Path.cwd()
    if asked is not None:
        spec, folder = asked.job.spec, Path(asked.plan.job_dir)
        fields = {"launch": flag("JOB", spec.launch.model_dump(mode="json"))}
        overrides = [text for text in overrides if text.startswith("launch.")]
        order["job"] = _endless(spec) if "loader" in parts else None
    own = {name: each for name, each in request.fields.items() if name.startswith("launch.")}
    request = replace(request, run_id=None, overrides=overrides, fields={**fields, **own})
    # a profile may set the GPUs too
    order["device"] = _program(request, folder, []).plan.device
    return _program(request, folder, [to_json(order)])


def _program(request: Request, folder: Path, arguments: list[str]) -> Prepared:
    fields = {**request.fields, "script_args": flag("bench", arguments)}
    job = JobWithoutFile({"name": "bench", "module": _MODULE}, folder, "bench")
    return plan_run(job, replace(request, fields=fields))


def _endless(spec: JobSpec) -> dict[str, Any]:
    """Return a job whose data do not end while they are read."""
    train = spec.train.model_copy(update={"epochs": None, "steps": 10**9})
    own = spec.model_copy(update={"train": train, "profile": None})
    return {name: value for name, value in own.to_plain().items() if name != "launch"}


def _run(prepared: Prepared, say: Callable[[str], None]) -> str:
    """Launch, wait for the end, and return the run's id."""
    prepared.refuse_unlaunchable(detach=False)
    plan, job, console = prepared.plan, prepared.job, Silent()
    say(f"measuring, with run {plan.run_id} by {plan.launcher}")
    if drive(prepared.launcher, plan, job.spec, job.text, console) != 0:
        why = "\n".join(console.messages)
        raise DtrainError(f"run {plan.run_id} of dtrain bench failed:\n{why}", code="bench.failed")
    return plan.run_id


def chosen(texts: Sequence[str]) -> list[str]:
    """Return the parts that `--only` names; all without a name.

    Raises:
        UsageError: a name is unknown.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            known = ", ".join(PARTS)
            raise UsageError(f"--only {name}: it has: {known}", code="usage.invalid-value")
    return [part for part in PARTS if part in names or not names]
