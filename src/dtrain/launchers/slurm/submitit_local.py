"""`executor: local` and `debug`: the job of `submit: submitit` on this machine, without a Slurm.

With `local` submitit starts a process, and the node below it; with `debug` it calls its function in
the command itself. Either way the node ends with the command: submitit alone would leave it behind.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
from dataclasses import replace
from typing import Any

from dtrain.errors import DtrainError, LaunchError, PlanError
from dtrain.launchers.base import Launch
from dtrain.launchers.local import LocalLauncher, NodeProcess
from dtrain.launchers.slurm import sbatch, script, submitit
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.plan import Facts, LaunchPlan
from dtrain.procs import die_with_parent
from dtrain.run import snapshot
from dtrain.run.rundir import RunDir

_TICK_S = 0.05
_NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit's own is 2 minutes
_FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
_SAFE = "PYTHONSAFEPATH"
_OURS = ("CUDA_VISIBLE_DEVICES", _SAFE)
"""Variables that the node has as we have them: submitit counts GPUs from 0."""


def complete(plan: LaunchPlan, facts: Facts, options: SlurmOptions) -> LaunchPlan:
    """As `Launcher.complete`: one node on this machine, with the set-up lines before it.

    Raises:
        PlanError: something is asked for that only Slurm gives.
    """
    if plan.nodes != 1:
        raise PlanError(
            f"executor: {options.executor} runs one node, and {plan.nodes} are asked for"
            f"{_place(plan, 'nodes')}; --launcher local simulates several on this machine"
        )
    for name in ("apptainer", "pyxis", "dependency"):
        if getattr(options, name):
            raise PlanError(
                f"option {name} takes executor: slurm, not {options.executor}{_place(plan, name)}"
            )
    facts = replace(facts, python=options.python or facts.python)
    settled = LocalLauncher().complete(replace(plan, options={}), facts)
    command = settled.commands[0]
    if lines := script.setup_lines(options):
        shell = "\n".join(["set -e", *lines, "set +e", 'exec "$@"'])
        command = replace(command, argv=("bash", "-c", shell, "bash", *command.argv))
    code = str(snapshot.job_folder(plan.run.code, plan.attempt))
    return replace(
        settled,
        commands=(command,),
        options=options.model_dump(mode="json"),
        code_dir=code if options.snapshot == "on" else "",
    )


def _place(plan: LaunchPlan, name: str) -> str:
    place = sbatch.place_of(plan, name)
    return f" ({place})" if place else ""


def start(plan: LaunchPlan) -> Launch:
    """Start a plan by submitit's local or debug executor.

    Raises:
        PlanError: submitit is not installed.
        LaunchError: it cannot be started.
    """
    library = submitit.library()
    options, folder = SlurmOptions.of(plan.options), submitit.folder_of(plan)
    if options.python and shutil.which(options.python) is None:
        raise LaunchError(f"cannot start {options.python}: there is no such program here")
    if options.executor == "debug":
        debugged = library.DebugExecutor(folder).submit(start_node, plan.run_dir)
        if error := debugged.exception():  # asked for its result first, it would start pdb
            raise error
        node: NodeProcess = debugged.result()
        return node
    executor = library.LocalExecutor(folder, python=submitit.python_of(options))
    executor.update_parameters(timeout_min=_NO_LIMIT_MIN, gpus_per_node=plan.gpus_per_node)
    # a Ctrl-C is ours to pass on; what comes meanwhile waits for us
    signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINAL)
    ours = {name: os.environ.get(name) for name in _OURS}
    try:
        os.environ[_SAFE] = "1"  # of submitit's process, which imports before `serve` can tell
        job = executor.submit(serve, plan.run_dir, os.getpid(), ours)
    finally:
        _restore(ours)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FROM_TERMINAL)
    return HereLaunch(job)


class HereLaunch:
    """A job of submitit's LocalExecutor."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self._stopped = False

    def poll(self) -> int | None:
        """See `Launch.poll`.

        Raises:
            LaunchError: the node could not be started, or submitit's process has ended before it.
        """
        if not self._job.done():
            return None
        if self._job.paths.result_pickle.exists() and self._job.exception() is None:
            result: int | str = self._job.result()
            if isinstance(result, str):
                raise LaunchError(result)
            return result
        if self._stopped:  # before there was a node
            return 128 + signal.SIGTERM
        said = (self._job.stderr() or "").strip().splitlines()
        why = f": {said[-1]}" if said else ""
        raise LaunchError(
            f"submitit's process ended without a result{why}; its log: {self._job.paths.stderr}"
        )

    def stop(self) -> None:
        """See `Launch.stop`: submitit passes it on."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Launch.kill`: all below dies with submitit's controller."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        self._stopped = True
        if not self._job.done():
            os.kill(int(self._job.job_id), number)  # our child: its pid is not another's yet


def start_node(run_dir: str) -> NodeProcess:
    """Start the node of a run below this process."""
    return NodeProcess(LaunchPlan.read(RunDir(run_dir)), listen_host="127.0.0.1")


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def serve(run_dir: str, driver: int, ours: dict[str, str | None]) -> int | str:
    """Run the node of a run below a process of submitit's, for as long as the launch lives.

    Args:
        run_dir: of the run.
        driver: pid of the command that launches.
        ours: variables of that command for the node, None for one that is not set.

    Returns:
        The exit code of the node's process, or why it could not be started.
    """
    die_with_parent(int(os.environ["SUBMITIT_LOCAL_JOB_ID"]))
    _restore(ours)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _frame: asked.append(number))
    for number in _FROM_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FROM_TERMINAL)
    try:
        node, alive = start_node(run_dir), os.pidfd_open(driver)
    except DtrainError as error:
        return str(error)
    while (code := node.poll()) is None:
        if asked:
            asked.clear()
            node.stop()
        if select.select([alive], [], [], _TICK_S)[0]:
            node.kill()
    return code
