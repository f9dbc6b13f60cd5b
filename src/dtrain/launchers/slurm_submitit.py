"""`submit: submitit`: the same job and the same agents, submitted by the submitit library.

For places whose tools know submitit's jobs. Its own state, checkpoints and requeueing are not used:
it knows only sacct, and takes a requeued job for failed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from dtrain.errors import PlanError
from dtrain.jobdir import JobDir
from dtrain.launchers import slurm_script, slurm_submit
from dtrain.launchers.slurm_options import SlurmOptions
from dtrain.launchers.slurm_watch import slurm_env
from dtrain.plan import LaunchPlan
from dtrain.procs import serve_under_submitit


def submit(plan: LaunchPlan) -> str:
    """Submit a plan; the job's id.

    Raises:
        PlanError: submitit is not installed, or Slurm refuses the job.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise PlanError("submit: submitit needs it: pip install 'dtrain[slurm]'") from None
    options = SlurmOptions.of(plan.options)
    command = slurm_script.agent_command(plan, options)
    try:
        with _environment(slurm_env()):
            executor = submitit.SlurmExecutor(plan.run.slurm, python=command_python(options))
            executor.update_parameters(**parameters(plan, options))
            return str(executor.submit(serve_under_submitit, command).job_id)
    except FailedJobError as error:
        raise PlanError(slurm_submit.refusal(plan, _said_by_sbatch(str(error)))) from None


def command_python(options: SlurmOptions) -> str:
    """The interpreter of submitit's own process, outside of any container."""
    import shlex
    import sys

    inside = options.apptainer or options.pyxis
    return shlex.quote(sys.executable if inside or not options.python else options.python)


def parameters(plan: LaunchPlan, options: SlurmOptions) -> dict[str, Any]:
    """What submitit's executor is told: our flags, our arguments of srun, our lines around it.

    Raises:
        PlanError: a flag is given several times, which submitit cannot do.
    """
    flags: dict[str, Any] = {}
    for name, value in slurm_script.flags(plan, options):
        if name in flags:
            raise PlanError(f"--slurm {name}: submitit takes a flag only once")
        flags[name] = True if value is None else value
    flags["output"] = slurm_script.pattern(JobDir(plan.run).log)
    own = {name: flags.pop(name) for name in ("nodes", "comment", "time") if name in flags}
    lines = slurm_script.render(plan).split("srun \\\n")
    return {
        "job_name": flags.pop("job-name"),
        "nodes": int(own.pop("nodes")),
        **({"time": own.pop("time")} if "time" in own else {}),
        "additional_parameters": {**flags, **own},
        "setup": lines[0].splitlines()[_first_of_setup(lines[0]) :],
        "srun_args": [
            f"--nodes={plan.nodes}",
            f"--ntasks={plan.nodes}",
            *slurm_script.srun_arguments(plan, options),
        ],
        "teardown": lines[1].splitlines()[_after_srun(lines[1]) :],
        "stderr_to_stdout": True,
    }


def _first_of_setup(text: str) -> int:
    """The number of the line after the last directive."""
    lines = text.splitlines()
    return max(number for number, line in enumerate(lines) if line.startswith("#")) + 1


def _after_srun(text: str) -> int:
    """The number of the line that keeps the exit code of srun."""
    return text.splitlines().index("status=$?")


def _said_by_sbatch(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("sbatch: "))


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
