"""Launcher `ray`: an actor of a Ray cluster on each node, which starts one node agent."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import replace

from dtrain import catalog, ports, procs
from dtrain.doctor.diagnosis import Diagnosis
from dtrain.environ import inherited_env
from dtrain.errors import LaunchError, PlanError
from dtrain.launch_plan import Command, Facts, LaunchPlan
from dtrain.launchers import prepare
from dtrain.launchers.base import Launch, Slot
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.ray import cluster, driver, job
from dtrain.launchers.ray.options import RayOptions
from dtrain.launchers.ray.placement import ResourceRequest
from dtrain.run import attempts, code_archive, failures, files, snapshot
from dtrain.run.backend_files import RayFiles
from dtrain.run.rundir import RunDir

_STOP_S = 3.0
_LOCAL = LocalLauncher()  # for a driver that is a process of this host


class RayLauncher:
    """A launcher that starts a driver: a process that ends with this command and imports Ray."""

    options_model = RayOptions

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        options = RayOptions.of(plan.options)
        argv: tuple[str, ...] = (facts.python, "-P", "-m", driver.__name__, plan.run_dir)
        if options.submit == "job":
            submit = ("ray", "job", "submit", f"--address={job.url(options)}", "--")
            argv = (*submit, *job.entrypoint(options))
        code = str(plan.run.job_code(plan.attempt))
        return replace(
            plan,
            node_names=("",) * plan.nodes,
            rdzv_host="",
            rdzv_port=0,
            options=options,
            code_dir=code if options.snapshot or options.submit == "job" else "",
            commands=(Command(where=facts.host, argv=argv),),
        )

    def preview(self, plan: LaunchPlan) -> list[str]:
        """Return the request to Ray, for `dtrain plan`."""
        options = RayOptions.of(plan.options)
        where = options.address or "a new cluster on this machine"
        return [
            "request to Ray",
            f"  cluster: {where}",
            f"  a placement group, STRICT_SPREAD: {ResourceRequest.of(plan)}",
        ]

    def diagnose(self, plan: LaunchPlan) -> Diagnosis:
        return cluster.check(plan)

    def can_detach(self, plan: LaunchPlan) -> bool:
        """Return whether the launch continues without this command."""
        return RayOptions.of(plan.options).submit == "job"

    def slots(self, plan: LaunchPlan, runs: int, at_once: int | None) -> list[Slot]:
        """See `Shareable.slots`. By default, as many runs as the cluster has place for.

        One at a time if each starts a cluster on this machine, or is a Ray job.
        """
        options = RayOptions.of(plan.options)
        count = at_once
        if count is None and options.address and options.submit == "driver":
            count = cluster.most_at_once(plan, cluster.nodes_of(options.address), runs)
        return [Slot()] * min(runs, count or 1)

    def start(self, plan: LaunchPlan) -> Launch:
        if problem := catalog.problem_of("launcher", "ray"):
            raise PlanError(problem, code="plan.missing-package")
        RayFiles(plan.run).clear()
        options = RayOptions.of(plan.options)
        if options.submit == "job":
            return job.submit(plan)
        if plan.code_dir:
            with prepare.writing():
                prepare.keep_code(plan)
                snapshot.copy_tree(plan.job_dir, plan.run, plan.attempt)
                if plan.run_url:
                    limits = (options.upload_limit, options.excludes)
                    code_archive.pack(plan.run, plan.attempt, *limits)
        return DriverProcess(plan)

    def is_running(self, run: RunDir) -> bool:
        if self.can_detach(LaunchPlan.read(run)):
            return job.is_running(run)
        return _LOCAL.is_running(run)

    def cancel(self, run: RunDir, timeout_s: float) -> None:
        if self.can_detach(LaunchPlan.read(run)):
            job.cancel(run, timeout_s)
        else:
            _LOCAL.cancel(run, timeout_s)

    def describe(self, run: RunDir) -> dict[str, str]:
        """Return the cluster of the run and the state of its job, for `dtrain status`."""
        launch = job.launch_of(run)
        if launch is not None:
            launch.is_over()
            return {"ray": launch.description}
        address = RayOptions.of(LaunchPlan.read(run).options).address
        return {"ray": str(address or "a cluster of this run")}


class DriverProcess:
    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan
        self._folder = RayFiles(plan.run)
        self._stopped = False
        (command,) = plan.commands
        env = {**inherited_env(), "RAY_USAGE_STATS_ENABLED": "0"}
        try:
            self._process = procs.start_child(command.argv, env=env, log=self._folder.log)
        except OSError as error:
            raise LaunchError(
                f"cannot start {command.argv[0]}: {error.strerror}",
                code="launch.command-not-started",
            ) from error

    def poll(self) -> int | None:
        """See `Launch.poll`.

        Raises:
            DtrainError: nothing could be started.
        """
        code = self._process.poll()
        if not code:
            return code
        refused = driver.refusal_of(self._plan.run)
        if refused is not None:
            raise refused
        if not self._stopped:
            self._record_end(code)
        return procs.shell_code(code)

    def stop(self) -> None:
        self._stopped = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Launch.kill`. The driver ends all nodes. If it is gone, Ray ends them."""
        self._stopped = True
        if self._process.poll() is not None:
            return
        for _ in range(2):  # the second time it does not wait for any node
            self._process.send_signal(signal.SIGTERM)
            time.sleep(0.1)  # two at once count as one
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            procs.kill_group(self._process.pid)
            self._process.wait()

    def _record_end(self, code: int) -> None:
        """Write a record if the driver itself was killed, or ended with the cluster."""
        run = self._plan.run
        attempt = attempts.newest_of(run, self._plan.attempt)
        address = RayOptions.of(self._plan.options).address
        if address and address != "auto" and not ports.is_listening(address):
            driver.record_head_lost(run, attempt, address)
        elif not failures.read_all(run, attempt):
            how = failures.signal_name(-code) if code < 0 else f"code {code}"
            output = files.last_line(self._folder.log) or "it has written no output"
            failures.record_node(
                run,
                attempt,
                f"the driver ended with {how}: {output}",
                exit_code=procs.shell_code(code),
                log=self._folder.log,
            )
