"""What a launcher is, and what all launchers do alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import yaml

from dtrain import catalog, environ
from dtrain.errors import DamagedError, DtrainError, LaunchError, PlanError, UsageError
from dtrain.job.load import LoadedJob
from dtrain.job.spec import JobSpec
from dtrain.job.yaml_reader import dump_yaml
from dtrain.plan import Command, Facts, LaunchPlan
from dtrain.run import events, files, snapshot, token
from dtrain.run.attempts import Handle, Held, Result, State
from dtrain.run.remote import runs as remote
from dtrain.run.rundir import RunDir


class Launch(Protocol):
    """A launch that has been started, in the hands of whoever follows it."""

    def poll(self) -> int | None:
        """The exit code once nothing of it runs any more, else None. Never blocks."""

    def stop(self) -> None:
        """Ask all workers to leave in order."""

    def kill(self) -> None:
        """End everything at once."""


class Launcher(Protocol):
    """Where processes start. Has no state: what must be remembered is in the run directory."""

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        """Add node names, the rendezvous endpoint and all commands. Pure.

        Raises:
            PlanError: an option is missing or makes no sense; says which flag sets it.
        """

    def start(self, plan: LaunchPlan) -> Launch:
        """Start exactly that plan; its run directory is already written.

        Raises:
            LaunchError: it cannot be started.
        """

    def is_running(self, run: RunDir) -> bool:
        """Whether the run's newest attempt is still going."""

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        """End the run in order, and by force once `timeout_s` seconds have passed.

        Some launchers can more, and are asked for it with getattr: `options_model`, a pydantic
        model of their options; `can_detach(plan)`; `lacking(plan)`, why this host cannot take the
        plan; `preview(plan)` and `describe(run)`, lines for `dtrain plan` and `dtrain status`.
        """


def load(name: str) -> Launcher:
    """The launcher of that name.

    Raises:
        PlanError: there is none.
    """
    launcher: Launcher = catalog.load("launcher", name)()
    return launcher


def prepare(plan: LaunchPlan, job: JobSpec, job_text: str, handle: Handle | None = None) -> None:
    """Write the run directory: everything that nodes and workers will read.

    Args:
        plan: the launch.
        job: what is trained.
        job_text: job.yaml as given.
        handle: of who is to drive the attempt, or one node of it, claimed before all else: of
            several commands only one gets any further.

    Raises:
        UsageError: this is a new launch, and the run exists, or another command drives it.
        PlanError: the URL of runs cannot be written to, or the job's secrets would stand there.
        LaunchError: it cannot be written; says which folder and why.
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
    except DtrainError:  # a place at a URL that does not answer says so itself
        raise
    except OSError as error:
        if claimed:
            run.handle(plan.attempt).unlink(missing_ok=True)  # nothing was started
        raise LaunchError(
            f"cannot write the run directory {run.path}: {error.strerror}; "
            "choose another place with --runs DIR"
        ) from error


def _claim(plan: LaunchPlan, handle: Handle) -> None:
    """Be the one who drives the attempt, and conclude the one before, whose driver was killed."""
    run = plan.run
    if not plan.is_of_node_zero:
        handle.claim_node(run, int(plan.options["node_rank"]))
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
    token.of_attempt(run, plan.attempt)
    files.write_atomic(run.job, job_text, mode=0o600 if hidden else 0o644)
    files.write_json(run.plan, plan.to_json())
    if hidden:
        files.write_atomic(run.secret_env(plan.attempt), json.dumps(hidden), mode=0o600)
    for path in (run.resolved_of(plan.attempt), run.resolved):  # the last makes it a run
        files.write_atomic(path, dump_yaml(shown.to_plain()))


def _refuse_secrets(job: JobSpec, job_text: str) -> None:
    written = [
        name
        for name, value in environ.secret(job.launch.env).items()
        if value and value in job_text
    ]
    if written:
        raise PlanError(
            f"the job file holds the value of {', '.join(written)}, and would stand beside the run "
            f"at its URL: take it out, and give it with --env {written[0]}"
        )


def _refuse_existing(plan: LaunchPlan) -> None:
    """Refuse a new launch of a run that was launched before, by a command or by hand.

    Of several commands, one a node, only node 0's can tell another launch from its own.
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
            f"run {run.id} exists; go on with: dtrain resume {run.id}, or give another --run-id"
        )


def keep_code(plan: LaunchPlan) -> None:
    """Take the snapshot of the code, once a run; while the nodes import torch, so it costs nothing.

    Never fails, see `snapshot.take`.
    """
    if not plan.run.code.exists():
        snapshot.take(plan.job_dir, plan.run.code)


def state_of(run: RunDir) -> tuple[State, Result | None]:
    """How the newest attempt of a run stands."""
    handle = Handle.read(run)
    if handle is None:
        from dtrain.launchers import status

        return status.state_of(run)
    result = Result.read(run, handle.attempt)
    if result is not None:
        return result.state, result
    if load(handle.launcher).is_running(run):
        return "running", None
    result = Result.read(run, handle.attempt)  # written by whoever saw the end first
    if result is None:
        run.remove_secrets(handle.attempt)  # whoever would have done so was killed
        return "lost", None
    return result.state, result


def with_secrets(job: LoadedJob, run: RunDir) -> LoadedJob:
    """A job read from resolved.yaml with its masked variables as job.yaml has them.

    Those given by `--env` at launch are nowhere on disk and are left out; give them again.
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
    """launch.env of a job file as it is kept."""
    try:
        launch = (yaml.safe_load(text) or {}).get("launch") or {}
        return dict(launch.get("env") or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError):
        raise DamagedError(str(run.job), "it is no job file") from None


def next_attempt(run: RunDir) -> int:
    """The number of the attempt that a relaunch makes, the same on every host of the run.

    Where node 0 has begun it already, it is the one that is going.
    """
    handle = Handle.read(run)
    if handle is None and not events.has_trained(run):
        return 0
    newest = 0 if handle is None else handle.attempt
    return newest if state_of(run)[0] == "running" else newest + 1


def served_by(command: Command) -> list[int]:
    """The nodes that a command is; none of one that asks a cluster for them."""
    following = zip(command.argv, command.argv[1:], strict=False)
    return [int(value) for option, value in following if option == "--node-rank"]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll a condition until it holds; False when the time is up."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def with_options(plan: LaunchPlan, known: dict[str, Any]) -> LaunchPlan:
    """The plan with a launcher's options checked and their defaults filled in.

    Raises:
        PlanError: an option is not among `known`.
    """
    from difflib import get_close_matches

    for name in plan.options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise PlanError(f"launcher {plan.launcher!r} has no option {name!r}{hint} ({has})")
    return replace(plan, options={**known, **plan.options})
