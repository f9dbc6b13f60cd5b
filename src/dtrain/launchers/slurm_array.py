"""`--array`: several runs as the elements of one Slurm array.

Each element is a run of its own, with its own directory, id and batch script; the script that is
submitted only starts the one that belongs to the element.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dtrain import rundir
from dtrain.errors import PlanError
from dtrain.jobdir import JobDir
from dtrain.launchers import slurm_limits, slurm_script, slurm_submit
from dtrain.launchers.slurm_options import SlurmOptions
from dtrain.launchers.slurm_watch import ask
from dtrain.plan import LaunchPlan

if TYPE_CHECKING:
    from pathlib import Path

_OWN = ("job-name", "comment")  # flags in which elements may differ


def within_partition(plans: Sequence[LaunchPlan]) -> tuple[list[LaunchPlan], str]:
    """The plans with a time limit that their partition gives, see `slurm_limits`."""
    first, cut = slurm_limits.within_partition(plans[0])
    if not cut:
        return list(plans), ""
    time = first.options["time"]
    return [replace(plan, options={**plan.options, "time": time}) for plan in plans], cut


def refuse_unlike(plans: Sequence[LaunchPlan]) -> None:
    """Refuse what cannot be one array.

    Raises:
        PlanError: elements ask Slurm for different things, or submitit is to submit them.
    """
    if plans[0].options["submit"] == "submitit":
        raise PlanError("submit: submitit submits one run at a time; --array takes submit: sbatch")
    first = _flags(plans[0])
    for plan in plans[1:]:
        flags = _flags(plan)
        if flags != first:
            differ = [flag for flag in (*flags, *first) if (flag in flags) != (flag in first)]
            shown = ", ".join(slurm_script.sbatch_option(*flag) for flag in differ)
            raise PlanError(
                f"--array: Slurm gives all elements of an array the same, but {plan.run_id} and "
                f"{plans[0].run_id} differ in {shown}; launch them one by one"
            )


def submit(plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
    """Submit runs whose own scripts are written; the job ids of the elements, `ARRAY_INDEX`.

    Raises:
        PlanError: Slurm refuses the array.
    """
    script = JobDir(plans[0].run).array_script
    rundir.write_atomic(script, render(plans, at_once), mode=0o755)
    logs = _of_element(plans, JobDir(plans[0].run).log, "%a")
    done = ask("sbatch", "--parsable", f"--output={logs}", str(script))
    if done.returncode != 0:
        raise PlanError(slurm_submit.refusal(plans[0], done.stderr))
    array = done.stdout.strip().partition(";")[0]
    return [f"{array}_{index}" for index in range(len(plans))]


def render(plans: Sequence[LaunchPlan], at_once: int | None) -> str:
    """The script of the array."""
    run_id = array_id(plans)
    runs = f"{run_id}-0 to {run_id}-{len(plans) - 1}"
    flags = [
        ("job-name", run_id),
        ("comment", f"dtrain runs {runs}"),
        ("array", f"0-{len(plans) - 1}" + (f"%{at_once}" if at_once else "")),
        *_flags(plans[0]),
    ]
    lines = [f"#SBATCH {slurm_script.sbatch_option(*flag)}" for flag in flags]
    folder = shlex.quote(f"{plans[0].run.path.parent}/{run_id}-")
    start = f'exec {folder}"$SLURM_ARRAY_TASK_ID"/slurm/{JobDir(plans[0].run).script.name}'
    about = f"# Runs {runs} of dtrain: each has its own script."
    return "\n".join(["#!/bin/bash", about, *lines, "", start, ""])


def array_id(plans: Sequence[LaunchPlan]) -> str:
    """What the ids of all runs of an array begin with: element k is `ID-k`."""
    return plans[0].run_id.removesuffix("-0")


def _of_element(plans: Sequence[LaunchPlan], path: Path, index: str) -> str:
    """A path in the run directory of the first element as the pattern of every element's."""
    run = plans[0].run.path
    folder = slurm_script.pattern(run.with_name(array_id(plans)))
    return f"{folder}-{index}/{path.relative_to(run)}"


def _flags(plan: LaunchPlan) -> list[tuple[str, str | None]]:
    """The flags of one run, without those in which elements may differ."""
    options = SlurmOptions.of(plan.options)
    return [flag for flag in slurm_script.flags(plan, options) if flag[0] not in _OWN]
