"""Submit the whole launch through the Ray Jobs API. It continues without this process."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import time
from dataclasses import replace
from typing import Any

from dtrain.errors import LaunchError, PlanError, first_line
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import prepare, status, supervise
from dtrain.launchers.ray import driver, job_output, package
from dtrain.launchers.ray.options import RayOptions
from dtrain.run import attempts, events, failures
from dtrain.run.attempts import Handle
from dtrain.run.backend_files import RayFiles
from dtrain.run.rundir import RunDir
from dtrain.waiting import poll

_MIN_PAUSE_S, _MAX_PAUSE_S, _PAUSE_GROWTH = 0.5, 5.0, 1.2
_OVER = {"SUCCEEDED", "FAILED", "STOPPED"}
_STOPPED = 128 + signal.SIGTERM


def url(options: RayOptions) -> str:
    address = str(options.address)
    return address if "://" in address else f"http://{address}"


def entrypoint(options: RayOptions) -> list[str]:
    """Return the command of the job, which runs in the uploaded directory."""
    module = ("-P", "-m", driver.__name__, "--job", package.FOLDER)
    return [options.python or "python", *module]


def client(options: RayOptions) -> Any:
    """Return a client of the cluster's job server.

    Raises:
        LaunchError: it does not answer.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it logs every upload
    try:
        return JobSubmissionClient(url(options))
    except Exception as error:  # ray raises ConnectionError, RuntimeError and its own
        raise LaunchError(
            f"no Ray job server answers at {url(options)}: {first_line(error)}; use the "
            "dashboard's URL, for example http://head:8265; if it requires a token, set "
            "RAY_AUTH_TOKEN_PATH",
            code="ray.no-job-server",
        ) from error


def submit(plan: LaunchPlan) -> JobLaunch:
    """Submit a plan to the cluster.

    Raises:
        DtrainError: it is too large, has secrets that cannot be sent, or is refused.
    """
    options = RayOptions.of(plan.options)
    if (options.cluster_runs or plan.run_url) and plan.run.secret_env(plan.attempt).exists():
        raise PlanError(
            "secret variables cannot be sent with a Ray job, because others can read its files: "
            "set them on the cluster, or use a runs directory that the cluster shares",
            code="ray.secret-variables",
        )
    with prepare.writing():
        folder = package.pack(plan)
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # git-ignored files are already excluded
    server = client(options)
    job_id = f"{plan.run_id}-{plan.attempt}"
    try:
        server.submit_job(
            entrypoint=shlex.join(entrypoint(options)),
            submission_id=job_id,
            runtime_env=_runtime_env(plan, options, str(folder)),
            metadata={"dtrain": plan.run_id},
        )
    except Exception as error:
        raise LaunchError(
            f"Ray refuses the job: {first_line(error)}", code="ray.job-refused"
        ) from error
    handle = Handle.of_this_process(plan.launcher, plan.attempt)
    replace(handle, job_id=job_id).write(plan.run)
    events.note_event(plan.run, "submitted", job_id=job_id, attempt=plan.attempt)
    return JobLaunch(plan, job_id)


def _runtime_env(plan: LaunchPlan, options: RayOptions, folder: str) -> dict[str, Any]:
    given = options.runtime_env
    env = {
        **given.get("env_vars", {}),
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(plan.stop_timeout_s + 10)),
        "RAY_worker_niceness": "0",
    }
    return {**given, "working_dir": folder, "env_vars": env}


class JobLaunch:
    def __init__(self, plan: LaunchPlan, job_id: str) -> None:
        self._plan = plan
        self._options = RayOptions.of(plan.options)
        self._job_id = job_id
        self._cancel = RayFiles(plan.run).cancel(plan.attempt)
        self._client: Any = None
        self._status, self._message = "PENDING", ""
        self._logged = ""
        self._query_at, self._pause_s = 0.0, _MIN_PAUSE_S
        self._since = time.monotonic()

    def poll(self) -> int | None:
        """See `Launch.poll`.

        Raises:
            DtrainError: nothing could be started.
        """
        if time.monotonic() < self._query_at:
            return None
        self._update()
        self._query_at = time.monotonic() + self._pause_s
        if self._status not in _OVER:
            return None
        refused = driver.refusal_of(self._plan.run)
        if refused is not None and self._status == "FAILED":
            raise refused
        return self.exit_code()

    def is_over(self) -> bool:
        """Return whether the job has ended, by its last known state if Ray does not answer."""
        self._update()
        return self._status in _OVER

    def exit_code(self) -> int:
        """Return the exit code of a finished job. If no failure record exists, write one."""
        run = self._plan.run
        if self._status == "SUCCEEDED":
            return 0
        if self._status == "STOPPED" or self.was_cancelled:
            return _STOPPED
        attempt = attempts.newest_of(run, self._plan.attempt)
        if not failures.read_all(run, attempt):
            name = f"the Ray job {self._job_id}"
            failures.record_node(run, attempt, f"{name} failed: {self._message}", node=name)
        return 1

    def stop(self) -> None:
        self._cancel.parent.mkdir(exist_ok=True)
        self._cancel.touch()
        self._query_at = 0.0
        with contextlib.suppress(Exception):  # it does not answer; `kill` repeats the request
            self._server().stop_job(self._job_id)

    def kill(self) -> None:
        """See `Launch.kill`. Ray itself kills processes that have not exited cleanly."""
        if self._status not in _OVER:
            self.stop()

    @property
    def was_cancelled(self) -> bool:
        """True if a user has requested its end."""
        return self._cancel.exists()

    @property
    def description(self) -> str:
        text = f"job {self._job_id} at {url(self._options)}: {self._status}"
        return f"{text}; {self._message}" if self._status == "PENDING" and self._message else text

    def _server(self) -> Any:
        if self._client is None:
            self._client = client(self._options)
        return self._client

    def _update(self) -> None:
        """Query the state of the job and apply the changes that it printed. This never fails."""
        before, failure = self._status, ""
        try:
            info = self._server().get_job_info(self._job_id)
            self._message = (info.message or "").strip().splitlines()[0] if info.message else ""
            status = str(getattr(info.status, "value", info.status))
            if self._options.cluster_runs or self._plan.run_url or status == "FAILED":
                job_output.apply(self._plan.run, self._server().get_job_logs(self._job_id))
            self._status = status
        except Exception as error:
            failure = f"Ray does not answer: {first_line(error)}; retrying"
            self._client = None
        same = self._status == before
        self._pause_s = min(self._pause_s * _PAUSE_GROWTH, _MAX_PAUSE_S) if same else _MIN_PAUSE_S
        text = failure or (self.description if self._status == "PENDING" else "")
        if text and text != self._logged:
            self._logged = text
            events.note_event(self._plan.run, "waiting", what=text)
        self._stop_if_not_started()

    def _stop_if_not_started(self) -> None:
        timeout_s = self._options.place_timeout
        if self._status == "PENDING" and time.monotonic() - self._since > timeout_s:
            try:
                self._server().stop_job(self._job_id)
            except Exception:
                return  # it may still start; the next query repeats this
            self._message = f"not started within {timeout_s:.0f} s (place_timeout)"
            self._status = "FAILED"


def launch_of(run: RunDir) -> JobLaunch | None:
    """Return the job of a run, from its directory alone, or None when it has none."""
    handle = Handle.read(run)
    if handle is None or handle.job_id is None:
        return None
    return JobLaunch(replace(LaunchPlan.read(run), attempt=handle.first), handle.job_id)


def is_running(run: RunDir) -> bool:
    """Return whether a run's job is running. Record the result of one that ended without a
    follower."""
    handle, launch = Handle.read(run), launch_of(run)
    if handle is None or launch is None:
        return False
    if not launch.is_over():
        return True
    plan = replace(LaunchPlan.read(run), attempt=handle.attempt)
    supervise.record_end(plan, launch.exit_code(), handle.started, cancelled=launch.was_cancelled)
    return False


def cancel(run: RunDir, timeout_s: float) -> None:
    """End a run's job cleanly. Ray kills processes that do not exit."""
    launch = launch_of(run)
    if launch is None:
        return
    launch.stop()
    poll(launch.is_over, timeout_s + 15)
    poll(lambda: status.state_of(run)[0] != "running", 10)
