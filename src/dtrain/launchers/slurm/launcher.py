"""Launcher `slurm`: one batch job, in which srun starts one node agent on each node."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from dtrain.doctor.diagnosis import Diagnosis
from dtrain.errors import LaunchError, PlanError
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.units import parse_duration
from dtrain.launch_plan import Command, Facts, LaunchPlan
from dtrain.launchers import prepare, status, supervise
from dtrain.launchers.base import Launch
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.slurm import cluster, outcome, queue, sbatch, script
from dtrain.launchers.slurm.options import SlurmOptions, as_slurm_writes
from dtrain.launchers.slurm.queue import Job, Unreachable, Watcher
from dtrain.launchers.slurm.sbatch import Sbatch
from dtrain.launchers.slurm.submitit import Submitit
from dtrain.run import attempts, events, failures, snapshot
from dtrain.run.attempts import Handle
from dtrain.run.backend_files import SlurmFiles
from dtrain.run.rundir import RunDir
from dtrain.waiting import poll


class Submitter(Protocol):
    """A way to submit jobs to Slurm. Run directories are written before anything is submitted.

    Both submit methods return job ids; for an array those of its elements, `ARRAY_INDEX`. They
    raise PlanError when Slurm refuses, with Slurm's reason and the location of the option.
    """

    def command(self, plan: LaunchPlan) -> list[str]:
        """Return the command that `dtrain plan` shows."""

    def files(self, plan: LaunchPlan) -> tuple[str, ...]:
        """Return the files that it writes for each run."""

    def shared_flags(self, plan: LaunchPlan) -> list[str]:
        """Return flags that must be identical in all elements of an array."""

    def render(self, plan: LaunchPlan) -> str:
        """Return the script that is submitted."""

    def submit(self, plan: LaunchPlan) -> str: ...

    def render_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> str:
        """Return the script that is submitted."""

    def submit_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]: ...


_SUBMITTERS: dict[str, Submitter] = {"sbatch": Sbatch(), "submitit": Submitit()}


def _submitter(plan: LaunchPlan) -> Submitter:
    return _SUBMITTERS[SlurmOptions.of(plan.options).submit]


class SlurmLauncher:
    options_model = SlurmOptions

    def survey(self, facts: Facts, options: AnyOptions) -> Facts:
        """See `Surveying.survey`. Add the limits of the partitions, when they may cut the time."""
        options = SlurmOptions.of(options)
        if options.time is None or not options.requeue:
            return facts
        return replace(facts, limits_s=queue.time_limits(options.partition))

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        options, notes = _within_limits(SlurmOptions.of(plan.options), facts.limits_s)
        python = options.python or _python(options, facts)
        options = options.model_copy(update={"python": python})
        plan = replace(
            plan,
            node_names=("",) * plan.nodes,
            rdzv_host="",
            rdzv_port=0,
            options=options,
            max_requeues=options.requeue,
            notes=(*plan.notes, *notes),
            code_dir=str(plan.run.job_code(plan.attempt)) if options.snapshot else "",
        )
        script.flags(plan)  # refuses flags that make no sense
        by = _submitter(plan)
        command = Command(where=facts.host, argv=tuple(by.command(plan)))
        return replace(plan, files=(*plan.files, *by.files(plan)), commands=(command,))

    def preview(self, plan: LaunchPlan) -> list[str]:
        """See `Previewable.preview`. Show the script, and Slurm's answer where Slurm is
        available."""
        text = _submitter(plan).render(plan)
        return [*_indented("script", text), *sbatch.test_only(plan, text)]

    def diagnose(self, plan: LaunchPlan) -> Diagnosis:
        return cluster.check(plan, _submitter(plan).render)

    def can_detach(self, plan: LaunchPlan) -> bool:
        return True

    def dependency_on(self, run: RunDir) -> str | None:
        state, _ = status.state_of(run)
        if state == "succeeded":
            return None
        handle = Handle.read(run)
        if handle is None or handle.job_id is None:
            raise PlanError(
                f"--after {run.id}: the run has no Slurm job; it is {state}",
                code="slurm.run-without-job",
            )
        if state != "running":
            raise PlanError(
                f"--after {run.id}: the run cannot succeed; it is {state}",
                code="slurm.run-will-not-succeed",
            )
        return f"afterok:{handle.job_id}"

    def start(self, plan: LaunchPlan) -> Launch:
        with prepare.writing():
            _write(plan)
            job_id = _submitter(plan).submit(plan)
        return _note_submitted(plan, job_id, Watcher(), followed=True)

    def preview_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
        """See `ArrayCapable.preview_array`. Add the script of one run where each has its own."""
        _check_shared_flags(plans)
        by = _submitter(plans[0])
        text = by.render_array(plans, at_once)
        shown = _indented("script of the array", text)
        if by.files(plans[0]):
            return shown + self.preview(plans[0])
        return shown + sbatch.test_only(plans[0], text)

    def start_array(
        self, plans: Sequence[LaunchPlan], at_once: int | None
    ) -> Sequence[SlurmLaunch]:
        _check_shared_flags(plans)
        with prepare.writing():
            for plan in plans:
                _write(plan)
            job_ids = _submitter(plans[0]).submit_array(plans, at_once)
        return [
            _note_submitted(plan, job_id, queue.shared, followed=False)
            for plan, job_id in zip(plans, job_ids, strict=True)
        ]

    def is_running(self, run: RunDir) -> bool:
        """See `Launcher.is_running`. Record the result of a job that ended without a follower."""
        handle = Handle.read(run)
        if handle is None:
            return False
        if handle.job_id is None:  # not submitted yet, or on this machine
            return handle.is_alive(run)
        if handle.is_visible and handle.is_alive(run):
            return True
        ended = SlurmFiles(run).end(handle.attempt).exists()
        try:
            job = queue.query_cached(handle.job_id, now=ended)
        except Unreachable:
            return True
        if not job.is_over:
            return True
        plan = replace(LaunchPlan.read(run), attempt=handle.attempt)
        ending = outcome.ending_of(plan, job)
        outcome.record(plan, job, ending)
        cancelled = outcome.was_cancelled(plan)
        supervise.record_end(plan, ending.exit_code, handle.started, cancelled=cancelled)
        return False

    def describe(self, run: RunDir) -> dict[str, str]:
        handle = Handle.read(run)
        if handle is None or handle.job_id is None:
            return {}
        try:
            return {"slurm": queue.query_cached(handle.job_id).description}
        except LaunchError as error:
            return {"slurm": f"job {handle.job_id}; {error}"}

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        """See `Launcher.cancel`. The process that follows the job ends it; without one, this
        process does."""
        handle = Handle.read(run)
        if handle is None or not self.is_running(run):
            return
        if handle.job_id is None:
            LocalLauncher().cancel(run, timeout_s)
            return
        if handle.is_visible and handle.is_alive(run):
            os.kill(handle.pid, signal.SIGTERM)
            if poll(lambda: not handle.is_alive(run), timeout_s):
                return
        plan = replace(LaunchPlan.read(run), attempt=handle.first)
        launch = SlurmLaunch(plan, handle.job_id, Watcher())
        launch.stop()
        if not poll(lambda: launch.poll() is not None, timeout_s):
            launch.kill()
            poll(lambda: launch.poll() is not None, timeout_s)
        poll(lambda: status.state_of(run)[0] != "running", 10)


class SlurmLaunch:
    def __init__(self, plan: LaunchPlan, job_id: str, watcher: Watcher) -> None:
        self._plan = plan
        self._job_id = job_id
        self._watcher = watcher
        self._cancel = SlurmFiles(plan.run).cancel(plan.attempt)
        self.description = ""
        """The state of the job, for users."""
        self._killed = False
        self._requeued: set[int] = set()

    def poll(self) -> int | None:
        plan = replace(self._plan, attempt=attempts.newest_of(self._plan.run, self._plan.attempt))
        ended = SlurmFiles(plan.run).end(plan.attempt).exists()
        job = self._watcher.job(self._job_id, now=ended)
        self._log_state(job)
        if job.unschedulable is not None and not self._killed:
            self._give_up(job, *job.unschedulable)
        if not job.is_over:
            return None
        ending = outcome.ending_of(plan, job)
        if ending.wants_requeue and self._requeue(job):
            return None
        outcome.record(plan, job, ending)
        return ending.exit_code

    def stop(self) -> None:
        """Ask the agents of a running job to exit; withdraw a waiting job."""
        self._cancel.touch()
        runs = self._watcher.job(self._job_id, now=True).state == "RUNNING"
        queue.run_command("scancel", *(["--signal=TERM"] if runs else []), self._job_id)

    def kill(self) -> None:
        if self._killed or self._watcher.job(self._job_id).is_over:
            return
        self._killed = True
        self._cancel.touch()
        queue.run_command("scancel", self._job_id)

    def _requeue(self, job: Job) -> bool:
        """Put a job back into the queue, once for each end. Return whether that was done."""
        if job.restarts in self._requeued:
            return False
        self._requeued.add(job.restarts)
        self._watcher.forget(self._job_id)
        return queue.run_command("scontrol", "requeue", self._job_id).returncode == 0

    def _log_state(self, job: Job) -> None:
        """Log an event when the state of the job has changed."""
        error = self._watcher.error
        text = f"Slurm does not answer: {error}; retrying" if error else job.description
        quiet = not error and job.state in ("COMPLETING", "UNKNOWN", "COMPLETED", "FAILED")
        if text != self.description and not quiet:
            self.description = text
            events.note_event(self._plan.run, "waiting", what=text)

    def _give_up(self, job: Job, option: str, why: str) -> None:
        """Withdraw a job that would wait forever."""
        names = [option] if option else ["time", "nodes", "cpus_per_node", "mem", "gpus"]
        sources = [sbatch.source_of(self._plan, name) for name in names]
        where = "".join(f"; {source}" for source in sources if source)
        plan, reason = self._plan, f"Slurm will never start the job: {why} ({job.reason}){where}"
        failures.record_node(plan.run, plan.attempt, reason, exit_code=2)
        self.kill()
        self._cancel.unlink(missing_ok=True)


def _within_limits(
    options: SlurmOptions, limits_s: Mapping[str, float]
) -> tuple[SlurmOptions, list[str]]:
    """Return the options with a time limit that their partition allows, and a sentence if it was
    cut.

    The job then continues over as many attempts as it needs. Of several partitions, the longest
    limit counts.
    """
    name = max(limits_s, key=lambda name: limits_s[name], default="")
    if options.time is None or not name or parse_duration(options.time) <= limits_s[name]:
        return options, []
    cut = as_slurm_writes(int(limits_s[name]))
    note = (
        f"the time limit of partition {name} is {cut}, less than {options.time}: the job continues "
        f"in as many attempts as it needs, at most {options.requeue + 1}"
    )
    return options.model_copy(update={"time": cut}), [note]


def _check_shared_flags(plans: Sequence[LaunchPlan]) -> None:
    by = _submitter(plans[0])
    first = by.shared_flags(plans[0])
    for plan in plans[1:]:
        flags = by.shared_flags(plan)
        if differ := [flag for flag in (*flags, *first) if (flag in flags) != (flag in first)]:
            raise PlanError(
                "--sweep: all elements of a Slurm array have the same flags, but those of "
                f"{plan.run_id} and {plans[0].run_id} differ in {', '.join(differ)}; launch these "
                "runs separately",
                code="slurm.array-differs",
            )


def _indented(title: str, text: str) -> list[str]:
    return [title, *(f"  {line}" for line in text.splitlines())]


def _write(plan: LaunchPlan) -> None:
    """Write the files that the job needs in its run directory, and log the plan's notes."""
    for note in plan.notes:
        events.note_event(plan.run, "waiting", what=note)
    folder = SlurmFiles(plan.run)
    folder.path.mkdir(parents=True, exist_ok=True)
    for path in folder.path.glob(folder.requeue("*").name):
        path.unlink(missing_ok=True)
    if plan.code_dir:
        prepare.keep_code(plan)
        snapshot.copy_tree(plan.job_dir, plan.run, plan.attempt)


def _note_submitted(
    plan: LaunchPlan, job_id: str, watcher: Watcher, *, followed: bool
) -> SlurmLaunch:
    """Record the job's id. If the job is followed, also record this process as the run's driver."""
    handle = replace(Handle.of_this_process(plan.launcher, plan.attempt), job_id=job_id)
    (handle if followed else replace(handle, identity=None)).write(plan.run)
    events.note_event(plan.run, "submitted", job_id=job_id, attempt=plan.attempt)
    return SlurmLaunch(plan, job_id, watcher)


def _python(options: SlurmOptions, facts: Facts) -> str:
    if options.venv:
        return os.path.join(options.venv, "bin", "python")
    return "python" if options.conda or options.apptainer or options.pyxis else facts.python
