"""`--array`: several runs as the elements of one Slurm array.

Each element is a run of its own, with its own directory and id. By sbatch each has its own batch
script, and the script that is submitted only starts the one that belongs to the element; by
submitit all share one, see `slurm_submitit`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtrain.errors import PlanError
from dtrain.launchers.slurm import sbatch, script, submitit
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.queue import run_command
from dtrain.plan import LaunchPlan
from dtrain.run import files
from dtrain.run.backend_files import SlurmFiles

if TYPE_CHECKING:
    from pathlib import Path

_OWN = ("job-name", "comment")  # flags in which elements may differ


def refuse_unlike(plans: Sequence[LaunchPlan]) -> None:
    """Refuse what cannot be one array.

    Raises:
        PlanError: elements ask Slurm for different things.
    """
    first = _shared(plans[0])
    for plan in plans[1:]:
        flags = _shared(plan)
        if flags != first:
            differ = [flag for flag in (*flags, *first) if (flag in flags) != (flag in first)]
            shown = ", ".join(script.sbatch_option(*flag) for flag in differ)
            raise PlanError(
                f"--array: Slurm gives all elements of an array the same, but {plan.run_id} and "
                f"{plans[0].run_id} differ in {shown}; launch them one by one"
            )


def submit(plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
    """Submit runs whose own scripts are written; the job ids of the elements, `ARRAY_INDEX`.

    Raises:
        PlanError: Slurm refuses the array.
    """
    if SlurmOptions.of(plans[0].options).submit == "submitit":
        return submitit.submit_array(plans, _of_array(plans, at_once))
    path = SlurmFiles(plans[0].run).array_script
    files.write_atomic(path, render(plans, at_once), mode=0o755)
    done = run_command("sbatch", "--parsable", f"--output={_logs(plans)}", str(path))
    if done.returncode != 0:
        raise PlanError(sbatch.refusal(plans[0], done.stderr))
    array = done.stdout.strip().partition(";")[0]
    return [f"{array}_{index}" for index in range(len(plans))]


def render(plans: Sequence[LaunchPlan], at_once: int | None) -> str:
    """The script of the array."""
    if SlurmOptions.of(plans[0].options).submit == "submitit":
        return submitit.render(plans, _of_array(plans, at_once))
    flags = [
        ("job-name", array_id(plans)),
        ("comment", _comment(plans)),
        ("array", f"0-{len(plans) - 1}" + (f"%{at_once}" if at_once else "")),
        *_flags(plans[0]),
    ]
    lines = [f"#SBATCH {script.sbatch_option(*flag)}" for flag in flags]
    start = f"exec {_as_shell(plans, SlurmFiles(plans[0].run).script)}"
    about = f"# Runs {script.one_line(_ids(plans))} of dtrain: each has its own script."
    return "\n".join(["#!/bin/bash", about, *lines, "", start, ""])


def array_id(plans: Sequence[LaunchPlan]) -> str:
    """What the ids of all runs of an array begin with: element k is `ID-k`."""
    return plans[0].run_id.removesuffix("-0")


def _ids(plans: Sequence[LaunchPlan]) -> str:
    return f"{array_id(plans)}-0 to {array_id(plans)}-{len(plans) - 1}"


def _comment(plans: Sequence[LaunchPlan]) -> str:
    return f"dtrain runs {_ids(plans)}"


def _of_array(plans: Sequence[LaunchPlan], at_once: int | None) -> dict[str, Any]:
    """The parameters of submitit in which an array is unlike its first run alone."""
    if len(plans) == 1:  # submitit makes no array of it
        return submitit.parameters(plans[0])
    requeue_file = _as_shell(plans, SlurmFiles(plans[0].run).requeue(""))
    told = submitit.parameters(plans[0], requeue_file)
    flags = {"comment": _comment(plans), "output": _logs(plans)}
    return {
        **told,
        "job_name": array_id(plans),
        "array_parallelism": at_once or len(plans),
        "additional_parameters": {**told["additional_parameters"], **flags},
    }


def _logs(plans: Sequence[LaunchPlan]) -> str:
    """Where Slurm writes what the script of each element says."""
    run, log = plans[0].run.path, SlurmFiles(plans[0].run).log
    folder = script.pattern(run.with_name(array_id(plans)))
    return f"{folder}-%a/{log.relative_to(run)}"


def _as_shell(plans: Sequence[LaunchPlan], path: Path) -> str:
    """A path in the run directory of the first element as every element's script has its own."""
    run = plans[0].run.path
    folder = shlex.quote(f"{run.with_name(array_id(plans))}-")
    return f'{folder}"$SLURM_ARRAY_TASK_ID"/{path.relative_to(run)}'


def _shared(plan: LaunchPlan) -> list[tuple[str, str | None]]:
    """What is the same for all elements: what Slurm is asked for, and what one script says."""
    options = SlurmOptions.of(plan.options)
    if options.submit == "sbatch":
        return _flags(plan)
    arguments = script.srun_arguments(plan, options)
    return [*_flags(plan), *((argument.removeprefix("--"), None) for argument in arguments)]


def _flags(plan: LaunchPlan) -> list[tuple[str, str | None]]:
    """The flags of one run, without those in which elements may differ."""
    options = SlurmOptions.of(plan.options)
    return [flag for flag in script.flags(plan, options) if flag[0] not in _OWN]
