"""Write the run directory of an attempt. It is claimed first, and complete with the last file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dtrain import environ
from dtrain.errors import DtrainError, LaunchError, PlanError, UsageError
from dtrain.job.yaml_reader import dump_yaml
from dtrain.launch_plan import LaunchPlan
from dtrain.run import attempts, events, files, snapshot
from dtrain.run.attempts import Handle, Held, Result
from dtrain.run.remote import runs as remote

if TYPE_CHECKING:
    from dtrain.job.spec import JobSpec


def prepare(plan: LaunchPlan, job: JobSpec, job_text: str, handle: Handle | None = None) -> None:
    """Write the run directory: everything that nodes and workers will read.

    Args:
        plan: the launch.
        job: the job to train.
        job_text: job.yaml as given.
        handle: the process that will drive the attempt, or one node of it. It is claimed first: of
            several commands, only one continues.

    Raises:
        UsageError: this is a new launch, and the run exists, or another command drives it.
        PlanError: the URL of runs is not writable, or the job's secrets would be stored there.
        LaunchError: it cannot be written; the message names the directory and the reason.
    """
    run = plan.run
    if plan.run_url:
        _refuse_secrets(job, job_text)
        remote.create(run, plan.run_url)
    run.create()
    _refuse_existing(plan)
    claimed = False
    try:
        if handle is not None:
            _claim(plan, handle)
            claimed = plan.is_of_node_zero
        remote.mark_unsynced(run)
        _write(plan, job, job_text)
    except DtrainError:  # a URL that does not answer has its own message
        raise
    except OSError as error:
        if claimed:
            run.handle(plan.attempt).unlink(missing_ok=True)  # nothing was started
        raise LaunchError(
            f"cannot write the run directory {run.path}: {error.strerror}; "
            "choose another directory with --runs DIR",
            code="launch.not-writable",
        ) from error


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn a failure to write a file in this block into a `LaunchError` that names the file."""
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"cannot write {error.filename}: {error.strerror}", code="launch.not-writable"
        ) from error


def _claim(plan: LaunchPlan, handle: Handle) -> None:
    """Claim the attempt, and record the previous one as lost if its driver was killed."""
    run = plan.run
    if not plan.is_of_node_zero:
        handle.claim_node(run, plan.node_ranks[0])
        return
    before = Handle.read(run)
    handle.claim(run)
    try:
        remote.claim(run, run.handle(plan.attempt))
    except FileExistsError:
        run.handle(plan.attempt).unlink()
        raise Held(run, remote.holder(run, plan.attempt)) from None
    except DtrainError:
        run.handle(plan.attempt).unlink()
        raise
    if before is not None:
        Result("lost", 1, before.started, time.time()).write(run, before.attempt)
        run.remove_secrets(before.attempt)


def _write(plan: LaunchPlan, job: JobSpec, job_text: str) -> None:
    run = plan.run
    hidden = environ.secret(job.launch.env)
    shown = job.model_copy(
        update={"launch": job.launch.model_copy(update={"env": environ.masked(job.launch.env)})}
    )
    run.attempt(plan.attempt).mkdir(parents=True, exist_ok=True)
    attempts.token(run, plan.attempt)
    files.write_atomic(run.job, job_text, mode=0o600 if hidden else 0o644)
    files.write_json(run.plan, plan.to_json())
    if hidden:
        files.write_atomic(run.secret_env(plan.attempt), json.dumps(hidden), mode=0o600)
    for path in (run.resolved_of(plan.attempt), run.resolved):  # the last makes it a run
        files.write_atomic(path, dump_yaml(shown.to_plain()))


def _refuse_secrets(job: JobSpec, job_text: str) -> None:
    found = [
        name
        for name, value in environ.secret(job.launch.env).items()
        if value and value in job_text
    ]
    if found:
        raise PlanError(
            f"the job file contains the value of {', '.join(found)}, and would be copied to the "
            f"run's URL: remove the value from the file, and pass it with --env {found[0]}",
            code="url.secret-in-job-file",
        )


def _refuse_existing(plan: LaunchPlan) -> None:
    """Refuse a new launch of a run that was launched before, by a command or by hand.

    With one command per node, only that of node 0 can distinguish another launch from its own.
    """
    if plan.attempt > 0:
        return
    run, exists = plan.run, Result.read(plan.run, 0) is not None
    if plan.is_of_node_zero:
        holder = Handle.read(run)
        if holder is not None and Result.read(run, holder.attempt) is None and holder.is_alive(run):
            raise Held(run, holder)
        exists = holder is not None or events.has_trained(run)
    if exists:
        raise UsageError(
            f"run {run.id} exists; continue with: dtrain resume {run.id}, or give another --run-id",
            code="run.exists",
        )


def keep_code(plan: LaunchPlan) -> None:
    """Take the snapshot of the code, once per run. It costs no time, because the nodes import
    torch.

    This never fails, see `snapshot.take`.
    """
    if not plan.run.code.exists():
        snapshot.take(plan.job_dir, plan.run)
