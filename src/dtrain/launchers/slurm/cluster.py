"""The check of a Slurm cluster for `dtrain doctor`: it answers, and would accept the job."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

from dtrain.codes import CODES
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis
from dtrain.errors import DtrainError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.slurm import sbatch
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.queue import node_states, run_command
from dtrain.words import counted

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
_NOT_USABLE = re.compile(r"down|drain|fail|unknown|power|maint|error|reserved|inval|boot|\*")
"""States of nodes on which no job starts now. `*` is for a node that does not answer."""


def check(plan: LaunchPlan, render: Callable[[LaunchPlan], str]) -> Diagnosis:
    """Ask Slurm about the batch script of a plan, without submitting it.

    Args:
        plan: the plan.
        render: makes the script.
    """
    if missing := [name for name in _COMMANDS if shutil.which(name) is None]:
        fact = f"{', '.join(missing)} not found in PATH"
        return Diagnosis("slurm", PROBLEM, fact, "use a login node of the cluster")
    try:
        ping = run_command("scontrol", "ping")
        if ping.returncode != 0 or " UP" not in ping.stdout:
            first = (ping.stdout + ping.stderr).strip().partition("\n")[0]
            return Diagnosis("slurm", PROBLEM, first or "no answer", "systemctl status slurmctld")
        start = sbatch.tested(plan, render(plan))
        states = node_states(SlurmOptions.of(plan.options).partition)
    except DtrainError as error:
        entry = CODES.get(error.code)
        remedy = entry.remedy if entry else ""
        return Diagnosis("slurm", PROBLEM, str(error), remedy, error.code)
    shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    fact = f"it would accept the job: {start}; nodes: {shown}"
    usable = sum(count for state, count in states.items() if not _NOT_USABLE.search(state))
    if usable >= plan.min_nodes:
        return Diagnosis("slurm", OK, fact)
    return Diagnosis(
        "slurm",
        WARNING,
        f"{fact}: the job asks for {counted(plan.min_nodes, 'node')} and waits until they are up",
        "sinfo -R shows why nodes are not usable; or choose another partition with -p",
    )
