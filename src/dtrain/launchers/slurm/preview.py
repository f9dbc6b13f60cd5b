"""What a plan would submit, and what Slurm thinks of it: nothing is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from dtrain.launchers.slurm import array, sbatch, script, submitit
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.plan import LaunchPlan


def show(plan: LaunchPlan) -> list[str]:
    """The script of a run, and what Slurm says of it where Slurm is at hand."""
    if SlurmOptions.of(plan.options).submit == "submitit":
        text = submitit.render([plan], submitit.parameters(plan))
    else:
        text = script.render(plan)
    return _shown("script", text) + _asked(plan, text)


def show_array(plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
    """The script of an array, and that of its first element where each has its own.

    Raises:
        PlanError: they cannot be one array.
    """
    array.refuse_unlike(plans)
    text = array.render(plans, at_once)
    shown = _shown("script of the array", text)
    if SlurmOptions.of(plans[0].options).submit == "submitit":
        return shown + _asked(plans[0], text)
    return shown + show(plans[0])


def _at_hand() -> bool:
    return shutil.which("sbatch") is not None


def _shown(title: str, text: str) -> list[str]:
    return [title, *(f"  {line}" for line in text.splitlines())]


def _asked(plan: LaunchPlan, text: str) -> list[str]:
    if not _at_hand():
        return []
    said = sbatch.test(plan, text)
    return ["asked of Slurm", *(f"  {line}" for line in said.splitlines())]
