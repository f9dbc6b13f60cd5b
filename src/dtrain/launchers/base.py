"""What a launcher is, and what all launchers do alike."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import yaml

from dtrain import catalog, procs, rundir, snapshot, variables
from dtrain.errors import LaunchError, PlanError, UsageError
from dtrain.job.load import LoadedJob
from dtrain.job.spec import JobSpec
from dtrain.job.yamlfile import dump_yaml
from dtrain.launchers import told
from dtrain.plan import Facts, LaunchPlan
from dtrain.remote import runs as remote
from dtrain.rundir import RunDir

State = Literal["running", "succeeded", "failed", "cancelled", "lost", "prepared"]
"""`lost`: whoever drove the run died before it could write how it ended."""


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
        model of their options; `can_detach(plan)`; `preview(plan)` and
        `describe(run)`, lines for `dtrain plan` and `dtrain status`.
        """


@dataclass(frozen=True)
class Handle:
    """Who drives a run: handle.json."""

    launcher: str
    attempt: int
    host: str
    pid: int
    identity: str | None
    """Of the process, see `procs.identity`: a pid alone may be somebody else's by now."""
    started: float
    job_id: str | None = None
    """Of the batch job that goes on without this process."""

    @classmethod
    def of_this_process(cls, plan: LaunchPlan) -> Handle:
        """A handle that names this process as the driver."""
        return cls(plan.launcher, plan.attempt, started=time.time(), **procs.this_process())

    @classmethod
    def read(cls, run: RunDir) -> Handle | None:
        """The run's handle; None when it was never started."""
        raw = rundir.read_json(run.handle)
        return None if raw is None else cls(**raw)

    def write(self, run: RunDir) -> None:
        """Write handle.json."""
        rundir.write_json(run.handle, asdict(self))

    def claim(self, run: RunDir) -> None:
        """Write handle.json, of several processes only one; FileExistsError for the others."""
        aside = run.handle.with_name(f".{run.handle.name}.{secrets.token_hex(8)}")
        rundir.write_json(aside, asdict(self))
        try:
            os.link(aside, run.handle)  # a rename would replace what another has just written
        finally:
            aside.unlink()

    def is_alive(self) -> bool:
        """Whether the driver still runs. From another host that cannot be seen: True there."""
        if self.host != socket.gethostname():
            return True
        return self.identity is not None and procs.identity(self.pid) == self.identity


@dataclass(frozen=True)
class Result:
    """How an attempt ended: result.json."""

    state: State
    exit_code: int
    started: float
    ended: float

    def write(self, run: RunDir, attempt: int) -> None:
        """Write result.json."""
        rundir.write_json(run.result(attempt), asdict(self))

    @classmethod
    def read(cls, run: RunDir, attempt: int) -> Result | None:
        """The attempt's result; None while it runs, or when its driver was killed."""
        raw = rundir.read_json(run.result(attempt))
        return None if raw is None else cls(**raw)


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
        handle: of who is to drive the run, written before all else: of several launches with
            one run id only one gets any further.

    Raises:
        UsageError: this is a new launch, and the run exists; nothing is written.
        PlanError: the URL of runs cannot be written to, or the job's secrets would stand there.
        LaunchError: it cannot be written; says which folder and why.
    """
    run, is_new = plan.run, plan.attempt == 0
    if plan.run_url:
        _refuse_secrets(job, job_text)
        remote.begin(run, plan.run_url)
    run.create()
    if is_new and _exists(plan):
        raise _run_exists(run)
    hidden = variables.secret(job.launch.env)
    shown = job.model_copy(
        update={"launch": job.launch.model_copy(update={"env": variables.masked(job.launch.env)})}
    )
    try:
        if handle is not None:
            handle.claim(run) if is_new else handle.write(run)
        run.attempt(plan.attempt).mkdir(parents=True, exist_ok=True)
        rundir.write_atomic(run.job, job_text, mode=0o600 if hidden else 0o644)
        rundir.write_json(run.plan, plan.to_json())
        if hidden:
            rundir.write_atomic(run.secret_env, json.dumps(hidden), mode=0o600)
        for path in (run.resolved_of(plan.attempt), run.resolved):  # the last makes it a run
            rundir.write_atomic(path, dump_yaml(shown.said()))
    except FileExistsError:
        raise _run_exists(run) from None
    except OSError as error:
        if handle is not None and is_new:
            run.handle.unlink(missing_ok=True)  # nothing was started
        raise LaunchError(
            f"cannot write the run directory {run.path}: {error.strerror}; "
            "choose another place with --runs DIR"
        ) from error


def _refuse_secrets(job: JobSpec, job_text: str) -> None:
    written = [
        name
        for name, value in variables.secret(job.launch.env).items()
        if value and value in job_text
    ]
    if written:
        raise PlanError(
            f"the job file holds the value of {', '.join(written)}, and would stand beside the run "
            f"at its URL: take it out, and give it with --env {written[0]}"
        )


def _exists(plan: LaunchPlan) -> bool:
    """Whether a run of this id was launched before, by a command or by hand.

    Of several commands, one a node, only node 0's can tell another launch from its own.
    """
    if not plan.is_of_node_zero:
        return Result.read(plan.run, 0) is not None
    return Handle.read(plan.run) is not None or told.has_trained(plan.run)


def _run_exists(run: RunDir) -> UsageError:
    return UsageError(
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
        from dtrain.launchers import by_hand

        return by_hand.state_of(run)
    result = Result.read(run, newest_attempt(run))
    if result is not None:
        return result.state, result
    if load(handle.launcher).is_running(run):
        return "running", None
    result = Result.read(run, newest_attempt(run))  # written by whoever saw the end first
    if result is None:
        run.secret_env.unlink(missing_ok=True)  # whoever would have removed it was killed
        return "lost", None
    return result.state, result


def newest_attempt(run: RunDir) -> int:
    """The attempt that is going or was the last: a batch job makes further ones by itself."""
    handle = Handle.read(run)
    if handle is None:
        return 0
    return handle.attempt if handle.job_id is None else max([handle.attempt, *run.attempts()])


def conclude_lost(run: RunDir) -> None:
    """Write a result for an attempt whose driver was killed, so that the next can begin."""
    handle = Handle.read(run)
    attempt = newest_attempt(run)
    if handle is not None and Result.read(run, attempt) is None:
        Result("lost", 1, handle.started, time.time()).write(run, attempt)


def with_secrets(job: LoadedJob, run: RunDir) -> LoadedJob:
    """A job read from resolved.yaml with its masked variables as job.yaml has them.

    Those given by `--env` at launch are nowhere on disk and are left out; give them again.
    """
    given = (yaml.safe_load(run.job.read_text()).get("launch") or {}).get("env") or {}
    env = {
        name: str(given.get(name, value)) if value == variables.MASK else value
        for name, value in job.spec.launch.env.items()
        if value != variables.MASK or name in given
    }
    launch = job.spec.launch.model_copy(update={"env": env})
    text = run.job.read_text()
    return replace(job, spec=job.spec.model_copy(update={"launch": launch}), text=text)


def next_attempt(run: RunDir) -> int:
    """The number of the attempt that a relaunch makes, the same on every host of the run.

    Where node 0 has begun it already, it is the one that is going.
    """
    if Handle.read(run) is None and not told.has_trained(run):
        return 0
    newest = newest_attempt(run)
    return newest if state_of(run)[0] == "running" else newest + 1


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
