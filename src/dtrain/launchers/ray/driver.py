"""Drive a run on a Ray cluster: `python -m dtrain.launchers.ray.driver RUN_DIR`.

This is a separate process, started by the command or, as a Ray job, by the cluster. It is the only
one that imports Ray. When it ends, for any cause, Ray ends its actors, and they end the processes
that they started.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain import ports
from dtrain.errors import DtrainError, LaunchError, PlanError, first_line, format_error, shortened
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.ray.options import RayOptions
from dtrain.procs import die_with_parent
from dtrain.run import events, failures, files, verdict
from dtrain.run.attempts import Handle, Held, Result
from dtrain.run.backend_files import RayFiles
from dtrain.run.rundir import RunDir

if TYPE_CHECKING:
    from dtrain.launchers.ray.attempt import Outcome
    from dtrain.launchers.ray.placement import Placed

_CONNECT_S = 5.0
_STOP_NODES_S = 5.0
_STOPPED = 128 + signal.SIGTERM


def main() -> None:
    """Drive a run to its end. This never returns."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.launchers.ray.driver")
    parser.add_argument("run_dir", nargs="?")
    parser.add_argument("--job", help="directory of an uploaded job, instead of RUN_DIR")
    parser.add_argument(
        "--parent", type=int, help="pid of the parent process; this one ends with it"
    )
    arguments = parser.parse_args()
    if arguments.parent:
        die_with_parent(arguments.parent)
    if arguments.job:
        status = _drive_as_job(Path(arguments.job).absolute())
    else:
        status = _drive(LaunchPlan.read(RunDir(arguments.run_dir)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Ray's own exit ends in SIGABRT after a signal


def _drive(plan: LaunchPlan) -> int:
    try:
        return Driver(plan).run()
    except DtrainError as error:
        print(format_error(error), file=sys.stderr)
        files.write_json(RayFiles(plan.run).refusal, _as_json(error))
        return error.exit_code


def _drive_as_job(folder: Path) -> int:
    from dtrain.launchers.ray import job_output
    from dtrain.launchers.ray.package import unpack
    from dtrain.run.remote.mirror import STARTING
    from dtrain.run.remote.runs import detach, syncing

    try:
        plan, is_shared = unpack(folder)
    except DtrainError as error:
        reason = json.dumps(_as_json(error)).encode()
        job_output.print_change({"name": "ray/refusal.json", "bytes": reason}, sys.stdout)
        return error.exit_code
    if is_shared:
        return _drive(plan)
    with (
        job_output.printing(plan.run, sys.stdout),
        syncing(plan.run, partial(_note, plan.run, "notice"), exclude=STARTING),
    ):
        code = _drive(plan)
    if plan.run_url:
        detach(plan.run)
    return code


def _note(run: RunDir, kind: str, text: str) -> None:
    events.note_event(run, kind, what=text)


def _as_json(refusal: DtrainError) -> dict[str, Any]:
    return {
        "message": str(refusal),
        "code": refusal.code,
        "usage": isinstance(refusal, PlanError),
    }


def refusal_of(run: RunDir) -> DtrainError | None:
    """Return why a driver has started nothing, or None when it has not recorded a reason."""
    kept: dict[str, Any] | None = files.read_json(RayFiles(run).refusal)
    if kept is None:
        return None
    kind = PlanError if kept["usage"] else LaunchError
    return kind(kept["message"], code=kept["code"])


def record_head_lost(run: RunDir, attempt: int, address: str | None) -> None:
    """Write a failure record for the loss of the cluster itself."""
    failures.record_node(
        run,
        attempt,
        "the head of the Ray cluster was lost, and with it all nodes of the run",
        kind="node_lost",
        node=f"the cluster at {address}" if address else "the cluster of this run",
        log=RayFiles(run).log,
    )


class HeadLost(Exception):
    """An error for the loss of the cluster itself. Ray's own calls would hang now."""


def decide(outcome: Outcome, stops: int, attempts_left: int) -> int | None:
    """Return the run's exit code after an attempt, or None when another attempt follows."""
    if not outcome.lost:
        return outcome.code
    if stops:
        return _STOPPED
    return outcome.code if attempts_left <= 0 else None


class Driver:
    """The driver of a run. It makes attempts until one succeeds or fails or no more are allowed."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan
        self._options = RayOptions.of(plan.options)
        self._stops = 0
        self._began = time.time()
        self._head = ""
        self._newest = plan.attempt
        self._cluster_gone = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """Return the exit code of the run.

        Raises:
            DtrainError: nothing could be started.
        """
        with self._cluster() as address:
            self._connect(address)
            threading.Thread(target=self._watch_head, daemon=True).start()
            try:
                return self._attempts()
            except HeadLost:
                self._record_head_lost()
                return 1

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stops += 1

    # -- the cluster -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[str]:
        if self._options.address:
            yield os.environ.get("RAY_ADDRESS", "auto") if self._in_job else self._options.address
            return
        from dtrain.launchers.ray.local_cluster import LocalCluster
        from dtrain.launchers.ray.placement import ResourceRequest

        resources = ResourceRequest.of(self._plan).per_node
        cluster = LocalCluster(self._plan.nodes, resources, dashboard=self._options.dashboard)
        self._say("starting a Ray cluster on this machine; --address HOST:PORT uses a running one")
        with cluster as address:
            if cluster.dashboard_url:
                self._say(f"Ray's dashboard: {cluster.dashboard_url}")
            yield address

    @property
    def _in_job(self) -> bool:
        return self._options.submit == "job"

    def _connect(self, address: str) -> None:
        if address != "auto":
            check_listening(address)
        import ray

        started = time.monotonic()
        try:
            if token := os.environ.get("RAY_AUTH_TOKEN_PATH"):
                os.environ["RAY_AUTH_TOKEN_PATH"] = os.path.abspath(token)
            # Ray's workers import first from the directory in which a driver connects
            with contextlib.chdir(self._plan.run.path):
                ray.init(
                    address=address,
                    namespace="dtrain",
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": {"RAY_worker_niceness": "0"}},  # Ray's own is 15
                )
        except Exception as error:
            raise connection_error(address, error) from error
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own handlers
            signal.signal(number, self._on_signal)
        events.note_event(self._plan.run, "connected", seconds=time.monotonic() - started)
        self._head = address = ray.get_runtime_context().gcs_address
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" and not is_loopback(address):
            self._say(
                f"warning: the cluster at {address} requires no token: anyone who can connect to "
                "it can run code on it; see RAY_AUTH_MODE in Ray's documentation"
            )

    def _watch_head(self) -> None:
        """Detect the loss of the head long before Ray's own minute is over."""
        heard = time.monotonic()
        limit = min(self._options.lost_after, 15.0)
        while not self._cluster_gone.wait(1.0):
            if ports.is_listening(self._head):
                heard = time.monotonic()
            if time.monotonic() - heard > limit:
                self._cluster_gone.set()
        time.sleep(_STOP_NODES_S)  # for the nodes that can still receive the request to end
        self._record_head_lost()
        os._exit(1)  # the main thread may hang in a call to the head for another minute

    def _record_head_lost(self) -> None:
        record_head_lost(self._plan.run, self._newest, self._options.address)

    # -- attempts ----------------------------------------------------------------------------

    def _attempts(self) -> int:
        """Make attempts until one is the last. Return its exit code."""
        from dtrain.launchers.ray.placement import Placer

        say = partial(_note, self._plan.run, "waiting")
        placer = Placer(self._plan, lambda: self._stops > 0, say)
        first = attempt = self._plan.attempt
        outcome = None
        while True:
            try:
                placed = placer.place(after_loss=outcome is not None)
                if placed is None:
                    return _STOPPED
                if outcome is not None:
                    self._begin_attempt(attempt)
                    self._record_end_of(attempt - 1, outcome.code)
            except DtrainError as error:
                if outcome is None:
                    raise
                self._say(f"no further attempt can be started: {error}")
                return outcome.code
            self._newest = attempt
            outcome, names = self._attempt(attempt, placed)
            placer.free(placed)
            code = decide(outcome, self._stops, self._options.relaunch - (attempt - first))
            if code is not None:
                return code
            who = ", ".join(f"node {rank} ({names[rank]})" for rank in outcome.lost)
            attempt += 1
            self._say(f"{who} was lost; attempt {attempt} continues from the last checkpoint")

    def _attempt(self, attempt: int, placed: Placed) -> tuple[Outcome, list[str]]:
        """Start and watch an attempt. Return how it ended, and the names of its nodes.

        Raises:
            HeadLost: the result is unknown.
        """
        from dtrain.launchers.ray.attempt import ActorGroup, NodeLost, Outcome

        group = ActorGroup(self._plan, attempt, placed)
        try:
            group.begin()
            outcome = group.watch(lambda: self._stops, self._cluster_gone.is_set)
        except NodeLost as error:
            outcome = Outcome(lost={error.node_rank: str(error)})
        print(f"attempt {attempt}: {outcome}, {self._stops} requests to stop", flush=True)
        group.record_lost(outcome)
        if not self._stops:
            group.record_unexplained(outcome)
        if outcome.lost:
            self._wait_for_head()
        if self._cluster_gone.is_set():
            raise HeadLost
        group.end()
        return outcome, group.names

    def _wait_for_head(self) -> None:
        """Wait after the loss of a node: if it was the head, this is detected before the next
        query."""
        while not self._cluster_gone.wait(0.2) and not ports.is_listening(self._head):
            pass

    def _begin_attempt(self, attempt: int) -> None:
        """Claim the next attempt while the previous one has no result, so that no other process
        can."""
        run, first = self._plan.run, self._plan.attempt
        # there is none if the command that submitted the job does not share this disk
        handle = Handle.read(run) or Handle.of_this_process(self._plan.launcher, first)
        if handle.first != first:
            raise Held(run, handle)
        job_id = f"{self._plan.run_id}-{first}" if self._in_job else None
        replace(handle, attempt=attempt, started=time.time(), job_id=job_id).claim(run)

    def _record_end_of(self, attempt: int, code: int) -> None:
        """Record why an attempt ended that another one follows."""
        run = self._plan.run
        judged = verdict.judge(run, attempt)
        if judged is not None:
            verdict.write(run, attempt, judged)
        Result("failed", code, self._began, time.time()).write(run, attempt)

    def _say(self, text: str) -> None:
        _note(self._plan.run, "notice", text)


def check_listening(address: str) -> None:
    """Check that a process listens at `HOST:PORT`.

    Raises:
        LaunchError: no process does.
    """
    try:
        socket.create_connection(ports.parse_address(address), _CONNECT_S).close()
    except OSError as error:
        raise LaunchError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; "
            "`ray start --head` prints its address",
            code="ray.no-cluster",
        ) from error


def connection_error(address: str, error: Exception) -> LaunchError:
    text = str(error).strip()
    if "oken" in text or "uthenticat" in text or isinstance(error, ConnectionError):
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        return LaunchError(
            f"the Ray cluster at {address} refuses the connection; if it requires a token, set "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (RAY_AUTH_MODE is {mode}): "
            f"{first_line(error)}",
            code="ray.not-allowed",
        )
    message = f"the Ray cluster at {address} cannot be joined: {shortened(text, 500)}"
    return LaunchError(message, code="ray.cannot-join")


def is_loopback(address: str) -> bool:
    """Return whether a cluster is on this host. Any other cluster should require a token."""
    with contextlib.suppress(OSError, ValueError):
        host = socket.gethostbyname(ports.parse_address(address)[0])
        return ipaddress.ip_address(host).is_loopback
    return False


if __name__ == "__main__":
    main()
