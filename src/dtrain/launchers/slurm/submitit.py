"""`submit: submitit`: the same job and the same agents, submitted by the submitit library.

For places whose tools know submitit's jobs. Its own state, checkpoints and requeueing are not used:
it knows only sacct, and takes a requeued job for failed.
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
from dtrain.launchers.slurm import sbatch, script
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.queue import slurm_env
from dtrain.plan import LaunchPlan
from dtrain.procs import serve_under_submitit
from dtrain.run.backend_files import SlurmFiles


def submit(plan: LaunchPlan) -> str:
    """Submit a plan; the job's id.

    Raises:
        PlanError: submitit is not installed, or Slurm refuses the job.
        LaunchError: there is no Slurm here.
    """
    return _submit([plan], parameters(plan))[0]


def submit_array(plans: Sequence[LaunchPlan], told: dict[str, Any]) -> list[str]:
    """Submit runs as one array of submitit's, whose files are in the folder of the first run.

    Args:
        plans: of the elements, in order.
        told: the parameters that all share.

    Returns:
        The job ids of the elements.

    Raises:
        PlanError: submitit is not installed, or Slurm refuses the array.
        LaunchError: there is no Slurm here.
    """
    job_ids = _submit(plans, told)
    for plan, job_id in zip(plans[1:], job_ids[1:], strict=True):
        log = SlurmFiles(plan.run).submitit_log(job_id)
        log.symlink_to(SlurmFiles(plans[0].run).submitit_log(job_id))
    return job_ids


def render(plans: Sequence[LaunchPlan], told: dict[str, Any]) -> str:
    """The script that submitit makes of these parameters.

    Raises:
        PlanError: submitit is not installed.
    """
    library()
    from submitit.slurm import slurm

    options = SlurmOptions.of(plans[0].options)
    folder = folder_of(plans[0])
    command = f"{python_of(options)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    if len(plans) > 1:
        told = {**told, "map_count": len(plans)}
    return slurm._make_sbatch_string(command=command, folder=folder, **told)


def _submit(plans: Sequence[LaunchPlan], told: dict[str, Any]) -> list[str]:
    submitit = library()
    from submitit.core.utils import FailedJobError

    if shutil.which("srun") is None:
        raise LaunchError("there is no srun here: launcher 'slurm' runs where Slurm's commands are")
    options = SlurmOptions.of(plans[0].options)
    commands = [script.agent_command(plan, options) for plan in plans]
    try:
        with _environment(slurm_env()), contextlib.redirect_stderr(io.StringIO()):  # we tell it
            executor = submitit.SlurmExecutor(folder_of(plans[0]), python=python_of(options))
            executor.update_parameters(**told)
            jobs = executor.map_array(serve_under_submitit, commands)
            return [str(job.job_id) for job in jobs]
    except FailedJobError as error:
        raise PlanError(sbatch.refusal(plans[0], _said_by_sbatch(str(error)))) from None


def library() -> Any:
    """The package submitit.

    Raises:
        PlanError: it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise PlanError("submit: submitit needs it: pip install 'dtrain[slurm]'") from None
    return submitit


def folder_of(plan: LaunchPlan) -> Path:
    """Where submitit keeps its files.

    Raises:
        PlanError: submitit would take a part of the path for a pattern, or of a line for a command.
    """
    folder = SlurmFiles(plan.run).path
    if "%" in str(folder) or not str(folder).isprintable():
        raise PlanError(
            f"submitit cannot use a path with a % or a line break: {str(folder)!r}; use --runs DIR"
        )
    return folder


def python_of(options: SlurmOptions) -> str:
    """The interpreter of submitit's own process, outside of any container."""
    inside = options.apptainer or options.pyxis
    python = sys.executable if inside or not options.python else options.python
    return f"{shlex.quote(python)} -P"


def parameters(plan: LaunchPlan, requeue_file: str | None = None) -> dict[str, Any]:
    """What submitit's executor is told: our flags, our arguments of srun, our lines around it.

    Args:
        plan: of the run, or of the first of an array.
        requeue_file: of an array, see `slurm_script.values`.

    Raises:
        PlanError: a flag is given several times, or the template has no srun to replace.
    """
    options = SlurmOptions.of(plan.options)
    flags: dict[str, Any] = {}
    for name, value in script.flags(plan, options):
        if name in flags:
            raise PlanError(f"--slurm {name}: submitit takes a flag only once")
        flags[name] = True if value is None else value
    flags["output"] = script.pattern(SlurmFiles(plan.run).log)
    nodes = script.nodes_as_shell(plan)
    setup, teardown = _around_srun(script.render(plan, requeue_file), options)
    return {
        "job_name": flags.pop("job-name"),
        "nodes": plan.nodes,  # the most; Slurm is told what the flags say
        "time": flags.pop("time", None),  # else it asks for 5 minutes
        "wckey": None,
        "additional_parameters": flags,
        # srun reads these; its arguments are quoted, and the number of nodes may be the attempt's
        "setup": [*setup, f"export SLURM_NNODES={nodes} SLURM_NTASKS={nodes}"],
        "srun_args": script.srun_arguments(plan, options),
        "teardown": teardown,
        "stderr_to_stdout": True,
    }


def _around_srun(text: str, options: SlurmOptions) -> tuple[list[str], list[str]]:
    """The lines of a batch script between its directives and srun, and those after srun."""
    before, _, after = text.partition("srun \\\n")
    lines, rest = before.splitlines(), after.splitlines()
    directives = [index for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    if not directives or "status=$?" not in rest:
        raise PlanError(
            f"template {options.template}: for submitit it needs #SBATCH lines, then a line "
            "`srun \\` and after its end one with `status=$?`, as the packaged one has"
        )
    return lines[directives[-1] + 1 :], rest[rest.index("status=$?") :]


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
