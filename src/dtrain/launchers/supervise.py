"""Turn a plan into an exit code: start it, follow it, stop it on request, report the result."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from dtrain import catalog
from dtrain.errors import DtrainError
from dtrain.forking import SERVER_ENDED
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import prepare
from dtrain.launchers.base import Detachable, Launch, Launcher
from dtrain.launchers.stopping import Stop, StopForwarder, stop_requests
from dtrain.plainjson import numbers
from dtrain.run import attempts, events, failures, files, verdict
from dtrain.run.attempts import Handle, Result, State
from dtrain.run.backend_files import SlurmFiles
from dtrain.run.failures import FailureRecord
from dtrain.run.progress import Progress
from dtrain.run.remote import runs as remote
from dtrain.run.remote.mirror import LAUNCH
from dtrain.run.verdict import Verdict
from dtrain.words import counted

if TYPE_CHECKING:
    from dtrain.job.spec import JobSpec

_TICK_S = 0.05


class Console(Protocol):
    """The display of a launch while it runs."""

    def begin(self, text: str) -> None:
        """Show what is about to happen."""

    def tick(self) -> None:
        """Show what is new."""

    def say(self, text: str) -> None:
        """Show a line from the launcher itself."""

    def close(self) -> None:
        """Show the rest; nothing more will come."""

    def width(self) -> int | None:
        """Return the maximum number of columns of a line, or None without a limit."""

    def paint(self, text: str, colour: str | None) -> str:
        """Return a text in a colour, where colours are shown."""


def drive(
    launcher: Launcher,
    plan: LaunchPlan,
    job: JobSpec,
    job_text: str,
    console: Console,
    *,
    detach: bool = False,
) -> int:
    """Write the run directory, start the plan and follow it to its end. Return the exit code.

    The exit code is 0 when every rank ended with 0. When one failed, it is the exit code of the
    root cause. When stopped by signal N, it is 128 + N. With `detach` it is 0 once the launch is
    started, if the launcher's launches can continue without this process.

    Raises:
        UsageError: the run exists already, or another command drives it.
        LaunchError: the launch cannot be started.
    """
    started = time.time()
    with stop_requests() as stop:
        prepare.prepare(plan, job, job_text, Handle.of_this_process(plan.launcher, plan.attempt))
        with remote.syncing(plan.run, console.say, include=_synced_patterns(launcher, plan)):
            return _drive(launcher, plan, console, stop, started, detach)


def _drive(
    launcher: Launcher, plan: LaunchPlan, console: Console, stop: Stop, started: float, detach: bool
) -> int:
    console.begin(_start_message(plan))
    launch = _start(launcher, plan, started)
    if detach:
        prepare.keep_code(plan)
        console.close()
        console.say(f"submitted; `dtrain logs --follow {plan.run_id}` shows it")
        return 0
    try:
        code = _follow_to_end(plan, launch, stop, console)
    except DtrainError as error:  # found by the launcher's own process
        record_refusal(plan, error, started, keep=plan.sweep is not None)
        raise
    plan = replace(plan, attempt=attempts.newest_of(plan.run, plan.attempt))
    state, code = _report_end(plan, code, stop, console)
    if state == "succeeded":
        seconds = max(0.0, time.time() - started)  # clocks may be set back
        console.say(_end_message(plan, console.paint("succeeded", "green"), seconds))
    finish(plan, Result(state, code, started, time.time()), console.say)
    return code


def can_detach(launcher: Launcher, plan: LaunchPlan) -> bool:
    """Return whether a launch continues without the command that started it."""
    return isinstance(launcher, Detachable) and launcher.can_detach(plan)


def _synced_patterns(launcher: Launcher, plan: LaunchPlan) -> tuple[str, ...]:
    """Return patterns of the files that this process keeps at a run's URL. Empty means all files.

    If the run continues without this process, its driver keeps the other files.
    """
    return LAUNCH if can_detach(launcher, plan) else ()


def record_end(plan: LaunchPlan, code: int, started: float, *, cancelled: bool = False) -> None:
    """Record how an attempt ended that no process has followed to its end.

    Args:
        plan: the plan, with the number of the last attempt.
        code: its exit code.
        started: the start time of the launch.
        cancelled: true if a user had requested the end.
    """
    state, code, _ = _judge(plan, code, cancelled)
    finish(plan, Result(state, code, started, time.time()), discard)
    remote.push(plan.run, LAUNCH)


def discard(_text: str) -> None:
    """Discard a message."""


def _start(launcher: Launcher, plan: LaunchPlan, started: float) -> Launch:
    try:
        return launcher.start(plan)
    except DtrainError as error:
        record_refusal(plan, error, started, keep=plan.sweep is not None)
        raise


def record_refusal(
    plan: LaunchPlan, error: DtrainError, started: float, *, keep: bool = False
) -> None:
    """Remove a new run that was refused before a worker started. The error explains why.

    A further attempt of a run is recorded as failed. So is a launch that others may know of: one
    with several commands, one per host, or one at a URL.

    Args:
        plan: the launch.
        error: the reason.
        started: the start time of the launch.
        keep: whether a new run stays too, because a sweep has it.
    """
    is_shared = bool(plan.run_url) or 0 < len(plan.node_ranks) < plan.nodes
    if plan.attempt == 0 and not is_shared and not keep and not plan.run.rank_logs(0):
        shutil.rmtree(plan.run.path, ignore_errors=True)
        return
    if plan.is_of_node_zero and not failures.read_all(plan.run, plan.attempt):
        failures.record_node(
            plan.run, plan.attempt, str(error), exit_code=error.exit_code, code=error.code
        )
    finish(plan, Result("failed", error.exit_code, started, time.time()), discard)


def _start_message(plan: LaunchPlan) -> str:
    ranks = counted(plan.world_size, "rank")
    nodes = "" if plan.nodes == 1 else f" on {plan.nodes} nodes"
    again = f", attempt {plan.attempt}" if plan.attempt else ""
    what = plan.trainer if plan.strategy == catalog.OWN else plan.strategy
    where = plan.run_url or plan.run_dir
    return f"{plan.run_id}{again}: {what} by {plan.launcher}, {ranks}{nodes}; {where}"


def _end_message(plan: LaunchPlan, succeeded: str, seconds: float) -> str:
    """Return the outcome, the location, and the digest, which allows a quick comparison of two
    runs."""
    text = f"{plan.run_id}: {succeeded} in {seconds:.1f} s"
    finished = _finished(plan)
    if finished is None:
        return f"{text}{events.ungrouped_suffix(plan.run)}"
    digest = f"parameters sha256 {finished['parameters_sha256']}"
    return "\n".join([f"{text}{outcome(plan)}", *_checkpoint(plan), digest])


def _checkpoint(plan: LaunchPlan) -> list[str]:
    """Return a line with the location of the model."""
    newest = Progress.read(plan.run).checkpoint
    if newest is None:
        return []
    return [f"checkpoint {plan.run_url or plan.run_dir}/checkpoints/{newest}"]


def outcome(plan: LaunchPlan) -> str:
    """Return ` after 230 steps: accuracy 0.98`, or nothing if the training did not record its
    end."""
    finished = _finished(plan)
    if finished is None:
        return ""
    metrics = ", ".join(f"{n} {value:.4g}" for n, value in numbers(finished["metrics"]).items())
    steps = f" after {counted(finished['steps'], 'step')}"
    return f"{steps}: {metrics}" if metrics else steps


def _finished(plan: LaunchPlan) -> dict[str, Any] | None:
    known = {"event": str, "steps": int, "metrics": dict, "parameters_sha256": str}
    recorded = files.read_lines(plan.run.events, **known)
    found = [event for event in recorded if event["event"] == "finished"]
    return found[-1] if found else None


def _follow_to_end(plan: LaunchPlan, launch: Launch, stop: Stop, console: Console) -> int:
    forwarder = StopForwarder(stop, plan.stop_timeout_s, console.say)
    try:
        prepare.keep_code(plan)
        with attempts.sending_heartbeats(plan.run, plan.attempt):
            while (code := launch.poll()) is None:
                console.tick()
                forwarder.forward([launch])
                time.sleep(_TICK_S)
        return code
    finally:
        launch.kill()
        console.close()


def _report_end(plan: LaunchPlan, code: int, stop: Stop, console: Console) -> tuple[State, int]:
    run = plan.run
    if stop.signal is not None:
        name = signal.Signals(stop.signal).name
        lost = events.unsaved_text(run, plan.attempt)
        console.say(f"stopped by {name}{lost}; the run is in {plan.run_url or run.path}")
        console.say(f"continue with: dtrain resume {run.id}")
        return "cancelled", 128 + stop.signal
    state, code, found = _judge(plan, code)
    if state == "cancelled":
        console.say(events.stop_message(run, plan.attempt, code))
    if found is not None:
        console.say(verdict.render(found, run, console.width(), console.paint))
    return state, code


def _judge(
    plan: LaunchPlan, code: int, cancelled: bool = False
) -> tuple[State, int, Verdict | None]:
    """Return the meaning of an exit code, and for a failure the verdict, which is kept for `why`.

    The returned exit code is that of the run. All ranks may end with 0 because one of them was
    asked to exit. The exit code of a rank that failed is more precise than that of its node.
    """
    if code == 0:
        stopped = events.stop_event(plan.run, plan.attempt)
        if stopped is None:
            return "succeeded", 0, None
        return "cancelled", events.exit_code(stopped), None
    judged = verdict.judge(plan.run, plan.attempt)
    was_signalled = code - 128 in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if cancelled or (judged is None and was_signalled):
        return "cancelled", code, None
    found = judged or verdict.Verdict(_unexplained(plan, code))
    if plan.is_of_node_zero:
        with contextlib.suppress(OSError):  # a full disk is often the cause
            verdict.write(plan.run, plan.attempt, found)
    return "failed", found.exit_code, found


def _unexplained(plan: LaunchPlan, code: int) -> FailureRecord:
    """Return a record with the last log line of nodes that left none. For a batch job, use its
    first node."""
    kinds = (
        plan.run.host_log,
        plan.run.agent_log,
        lambda _, rank: SlurmFiles(plan.run).node_log(rank),
    )
    ranks = plan.node_ranks or (0,)
    logs = {kind(plan.attempt, rank): rank for rank in ranks for kind in kinds}
    last_lines = {log: files.last_line(log) for log in logs}
    useful = [log for log, line in last_lines.items() if line and not line.endswith(SERVER_ENDED)]
    # the log written last is that of the failed node
    log = max(useful, key=lambda log: log.stat().st_mtime, default=next(iter(logs)))
    how = f"the node process {failures.describe_exit(code)}"
    return failures.of_node(
        f"{how}: {last_lines[log] or 'it has written no output'}",
        exit_code=code,
        node_rank=logs[log],
        node=plan.node_names[logs[log]],
        log=log,
    )


def finish(plan: LaunchPlan, result: Result, say: Callable[[str], None]) -> None:
    """Record how an attempt ended, and remove files that are no longer needed."""
    run = plan.run
    if not plan.is_of_node_zero:
        return
    run.remove_secrets(plan.attempt)
    failures.remove_fallback_dir(run, plan.attempt)
    try:
        if result.write(run, plan.attempt):
            events.note_event(run, "ended", state=result.state, exit_code=result.exit_code)
    except OSError as error:
        say(f"cannot write {run.result(plan.attempt)}: {error.strerror}")
