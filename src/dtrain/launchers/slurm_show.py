"""What a plan would submit, and what Slurm thinks of it: nothing is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from dtrain.launchers import slurm_array, slurm_limits, slurm_script, slurm_submit, slurm_submitit
from dtrain.plan import LaunchPlan


def run(plan: LaunchPlan) -> list[str]:
    """The script of a run, and what Slurm says of it where Slurm is at hand."""
    if plan.options["executor"] != "slurm":
        return [f"started by submitit's {plan.options['executor']} executor, with no Slurm"]
    plan, cut = slurm_limits.within_partition(plan) if _at_hand() else (plan, "")
    if plan.options["submit"] == "submitit":
        script = slurm_submitit.render([plan], slurm_submitit.parameters(plan))
    else:
        script = slurm_script.render(plan)
    return _shown("script", script) + _asked(plan, script, cut)


def array(plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
    """The script of an array, and that of its first element where each has its own.

    Raises:
        PlanError: they cannot be one array.
    """
    slurm_array.refuse_unlike(plans)
    plans, cut = slurm_array.within_partition(plans) if _at_hand() else (plans, "")
    script = slurm_array.render(plans, at_once)
    shown = _shown("script of the array", script)
    if plans[0].options["submit"] == "submitit":
        return shown + _asked(plans[0], script, cut)
    return shown + run(plans[0])


def _at_hand() -> bool:
    return shutil.which("sbatch") is not None


def _shown(title: str, text: str) -> list[str]:
    return [title, *(f"  {line}" for line in text.splitlines())]


def _asked(plan: LaunchPlan, script: str, cut: str) -> list[str]:
    if not _at_hand():
        return []
    said = [cut] if cut else []
    return ["asked of Slurm", *(f"  {line}" for line in (*said, slurm_submit.test(plan, script)))]
