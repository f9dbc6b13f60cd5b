"""`submit: submitit`, which submits the same job and agents with the submitit library.

It is for sites whose tools know submitit's jobs. submitit's own state, checkpoints and requeueing
are not used: it knows only sacct, and treats a requeued job as failed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import LaunchError, PlanError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.slurm import sbatch, script
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.queue import slurm_env
from dtrain.procs import serve_under_submitit
from dtrain.run.backend_files import SlurmFiles


class Submitit:
    """A submitter by a script that submitit writes. The runs of an array share it, in one
    directory."""

    def command(self, plan: LaunchPlan) -> list[str]:
        return ["submitit", *script.agent_command(plan)]

    def files(self, plan: LaunchPlan) -> tuple[str, ...]:
        return ()

    def shared_flags(self, plan: LaunchPlan) -> list[str]:
        return [*script.shared_options(plan), *script.srun_arguments(plan)]

    def render(self, plan: LaunchPlan) -> str:
        return self.render_array([plan], None)

    def submit(self, plan: LaunchPlan) -> str:
        return self._submit([plan], None)[0]

    def render_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> str:
        _import()
        from submitit.slurm.slurm import _make_sbatch_string  # no public function shows one

        folder = _folder(plans[0])
        command = f"{_python(plans[0])} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        arguments = parameters(plans, at_once)
        if len(plans) > 1:
            arguments["map_count"] = len(plans)
        return _make_sbatch_string(command=command, folder=folder, **arguments)

    def submit_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
        """Submit runs as one array; each alone where some runs of a sweep have ended already.

        submitit numbers the elements of an array from 0, and their directories end with it.

        Raises:
            PlanError: there are not all runs, and `at_once` needs an array.
        """
        if len(plans) == 1 or script.array_numbers(plans) == list(range(len(plans))):
            return self._submit(plans, at_once)
        if at_once:
            raise PlanError(
                "--at-once needs an array, and submitit makes none of some runs of a sweep; leave "
                "it out, or use submit: sbatch",
                code="slurm.array-of-some",
            )
        return [self._submit([plan], None)[0] for plan in plans]

    def _submit(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
        submitit = _import()
        from submitit.core.utils import FailedJobError

        if shutil.which("srun") is None:
            raise LaunchError(
                "srun is not installed here; use launcher 'slurm' where Slurm's commands are",
                code="slurm.no-commands",
            )
        commands = [script.agent_command(plan) for plan in plans]
        try:
            with _environment(slurm_env()), contextlib.redirect_stderr(io.StringIO()):  # reported
                executor = submitit.SlurmExecutor(_folder(plans[0]), python=_python(plans[0]))
                executor.update_parameters(**parameters(plans, at_once))
                jobs = executor.map_array(serve_under_submitit, commands)
                job_ids = [str(job.job_id) for job in jobs]
        except FailedJobError as error:
            stderr = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
            raise sbatch.refusal(plans[0], "\n".join(stderr)) from None
        for plan, job_id in zip(plans[1:], job_ids[1:], strict=True):
            log = SlurmFiles(plan.run).submitit_log(job_id)
            log.symlink_to(SlurmFiles(plans[0].run).submitit_log(job_id))
        return job_ids


def parameters(plans: Sequence[LaunchPlan], at_once: int | None = None) -> dict[str, Any]:
    """Return the parameters of submitit's executor: dtrain's flags, srun arguments and shell lines.

    Raises:
        PlanError: a flag is given several times.
    """
    plan, is_array = plans[0], len(plans) > 1  # submitit makes no array of one run
    flags: dict[str, Any] = {}
    for name, value in script.flags(plan):
        if name in flags:
            raise PlanError(
                f"-o slurm.{name}: submitit takes a flag only once", code="slurm.flag-repeated"
            )
        flags[name] = True if value is None else value
    folder = SlurmFiles(plan.run)
    flags["output"] = script.pattern(folder.log)
    requeue = shlex.quote(str(folder.requeue("")))
    if is_array:
        flags |= {
            "job-name": script.array_id(plans),
            "comment": f"dtrain runs {script.array_runs(plans)}",
            "output": script.array_logs(plans),
        }
        requeue = script.path_in_array(plans, folder.requeue(""))
    nodes = script.nodes_as_shell(plan)
    return {
        "job_name": flags.pop("job-name"),
        "nodes": plan.nodes,  # the maximum; Slurm gets the value in the flags
        "time": flags.pop("time", None),  # otherwise it requests 5 minutes
        "wckey": None,
        "additional_parameters": flags,
        # srun reads these; its arguments are quoted, and the number of nodes may be the attempt's
        "setup": [*script.setup_lines(plan), f"export SLURM_NNODES={nodes} SLURM_NTASKS={nodes}"],
        "srun_args": script.srun_arguments(plan),
        "teardown": script.teardown_lines(requeue),
        "stderr_to_stdout": True,
        **({"array_parallelism": at_once or len(plans)} if is_array else {}),
    }


def _import() -> Any:
    try:
        import submitit
    except ImportError:
        raise PlanError(
            "submit: submitit needs package submitit: pip install 'dtrain[slurm]'",
            code="plan.missing-package",
        ) from None
    return submitit


def _folder(plan: LaunchPlan) -> Path:
    folder = SlurmFiles(plan.run).path
    # submitit would read part of such a path as a pattern, or part of a line as a command
    if "%" in str(folder) or not str(folder).isprintable():
        raise PlanError(
            f"submitit cannot use a path with a % or a line break: {str(folder)!r}; use --runs DIR",
            code="slurm.path-not-usable",
        )
    return folder


def _python(plan: LaunchPlan) -> str:
    """Return the interpreter of submitit's own process, outside any container."""
    options = SlurmOptions.of(plan.options)
    inside = options.apptainer or options.pyxis
    python = sys.executable if inside or not options.python else options.python
    return f"{shlex.quote(python)} -P"


@contextlib.contextmanager
def _environment(env: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
