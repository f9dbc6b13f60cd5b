"""The batch script of a plan: which flags, which commands, all of it quoted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from dtrain.assets import asset_dir
from dtrain.errors import PlanError, quoted
from dtrain.job.units import parse_duration
from dtrain.launchers import templates
from dtrain.launchers.slurm.options import FLAGS, SlurmOptions, own_flag_problem
from dtrain.plan import LaunchPlan
from dtrain.run.backend_files import SlurmFiles

_WAIT_S = 10
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]-]*")


def render(plan: LaunchPlan, requeue_file: str | None = None) -> str:
    """The whole script, from the packaged template or the user's own.

    Args:
        plan: of the run, or of the first of those that share the script.
        requeue_file: see `values`.

    Raises:
        PlanError: jinja2 is not installed, or the template cannot be read or filled.
    """
    options = SlurmOptions.of(plan.options)
    path = Path(options.template or asset_dir("slurm") / "job.sbatch.j2").expanduser()
    return templates.fill(path, values(plan, options, requeue_file))


def values(
    plan: LaunchPlan, options: SlurmOptions, requeue_file: str | None = None
) -> dict[str, Any]:
    """What a template can use; texts are quoted for the place where they stand.

    Args:
        plan: of the run, or of the first of those that share the script.
        options: the launcher's own.
        requeue_file: as shell, where the script is shared by several runs; None: the plan's.
    """
    return {
        "run_id": one_line(plan.run_id),
        "sbatch_options": [sbatch_option(name, value) for name, value in flags(plan, options)],
        "setup_lines": setup_lines(options),
        "srun_arguments": [
            f"--nodes={nodes_as_shell(plan)}",
            f"--ntasks={nodes_as_shell(plan)}",
            *map(shlex.quote, srun_arguments(plan, options)),
        ],
        "agent_command": shlex.join(agent_command(plan, options)),
        "requeue_file": requeue_file or shlex.quote(str(SlurmFiles(plan.run).requeue(""))),
    }


def flags(plan: LaunchPlan, options: SlurmOptions) -> list[tuple[str, str | None]]:
    """Every flag of sbatch, by its long name, with its value; None for one without a value.

    Raises:
        PlanError: one of `slurm:` is dtrain's own.
    """
    comment = f"dtrain run {plan.run_id}"
    found: list[tuple[str, str | None]] = [
        ("job-name", plan.run_id),
        ("comment", f"{comment} {options.comment}" if options.comment else comment),
        ("nodes", str(plan.nodes) if _is_fixed(plan) else f"{plan.min_nodes}-{plan.nodes}"),
        # with it, Slurm gives the fewest nodes of a range, however many are free
        *([("ntasks-per-node", "1")] if _is_fixed(plan) else []),
        ("cpus-per-task", str(cpus_per_node(plan, options))),
    ]
    if plan.gpus_per_node and not options.gres:
        found.append(("gpus-per-node", str(plan.gpus_per_node)))
    for field, flag in FLAGS.items():
        value = getattr(options, field)
        if value is not None:
            found.append((flag, value))
    if options.mail:
        found += [("mail-user", options.mail), ("mail-type", "END,FAIL,REQUEUE")]
    found += [
        ("signal", f"USR2@{_signal_before(options)}"),
        ("requeue" if options.requeue else "no-requeue", None),
        ("open-mode", "append"),
    ]
    found += _further_flags(options)
    for name, value in found:
        if value is not None and not value.isprintable():
            raise PlanError(
                f"--{name} {quoted(value)}: a line break cannot stand in a batch script"
            )
    return found


def _signal_before(options: SlurmOptions) -> int:
    """Seconds; of a short time limit the half, for the workers to get anywhere at all."""
    limit = parse_duration(options.time) if options.time else float("inf")
    return max(1, int(min(options.signal_before, limit / 2)))


def _further_flags(options: SlurmOptions) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for name, value in options.slurm.items():
        problem = own_flag_problem(name)
        if problem:
            raise PlanError(f"--slurm {name}: {problem}")
        flag = name.lstrip("-").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
            raise PlanError(f"--slurm {name!r}: not the long name of a flag of sbatch")
        for each in value if isinstance(value, list) else [value]:
            if each is not False:
                found.append((flag, None if each is True else str(each)))
    return found


def cpus_per_node(plan: LaunchPlan, options: SlurmOptions) -> int:
    """CPUs that a node's agent and all of its workers share."""
    return options.cpus_per_node or plan.procs_per_node * plan.replicas


def setup_lines(options: SlurmOptions) -> list[str]:
    """Shell that makes the environment of the agents."""
    lines = list(options.setup)
    if options.modules:
        lines.append(f"module load {shlex.join(options.modules)}")
    if options.conda:
        lines.append("conda_base=$(conda info --base)")
        lines.append('. "$conda_base/etc/profile.d/conda.sh"')
        lines.append(f"conda activate {shlex.quote(options.conda)}")
    if options.venv:
        lines.append(f". {shlex.quote(options.venv + '/bin/activate')}")
    return lines


def _is_fixed(plan: LaunchPlan) -> bool:
    return plan.min_nodes == plan.nodes


def nodes_as_shell(plan: LaunchPlan) -> str:
    """How many nodes srun takes: of an elastic job, what this attempt was given."""
    return str(plan.nodes) if _is_fixed(plan) else '"$SLURM_JOB_NUM_NODES"'


def srun_arguments(plan: LaunchPlan, options: SlurmOptions) -> list[str]:
    """One agent on each node, with all of the node's CPUs: srun does not take them from the job."""
    found = [
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus_per_node(plan, options)}",
        "--kill-on-bad-exit=1",
        # all end together; without it srun waits for ever for a node whose step daemon was killed
        f"--wait={int(plan.stop_timeout_s) + _WAIT_S}",
    ]
    if options.pyxis:
        mounts = ",".join(f"{folder}:{folder}" for folder in _shared_folders(plan))
        found += [f"--container-image={options.pyxis}", f"--container-mounts={mounts}"]
        found += options.container_args
    return found


def agent_command(plan: LaunchPlan, options: SlurmOptions) -> list[str]:
    """What srun starts on each node."""
    command = [options.python or "python", "-P", "-m", "dtrain.node", plan.run_dir]
    command += ["--placement", "slurm"]
    if not options.apptainer:
        return command
    binds = [part for folder in _shared_folders(plan) for part in ("--bind", folder)]
    return ["apptainer", "exec", *binds, *options.container_args, options.apptainer, *command]


def _shared_folders(plan: LaunchPlan) -> list[str]:
    """What a container must see besides its own files."""
    return list(dict.fromkeys((str(plan.run.path), plan.job_dir)))


def pattern(path: Path) -> str:
    """A path as a file name pattern of Slurm: `%` stands for itself.

    Raises:
        PlanError: it holds a backslash, which takes their meaning from all patterns.
    """
    if "\\" in str(path):
        raise PlanError(f"Slurm cannot write to a path with a backslash: {path}; use --runs DIR")
    return str(path).replace("%", "%%")


def one_line(text: str) -> str:
    """A text as it stands in a comment of a script: a line break would end that."""
    return text if text.isprintable() else quoted(text)


def sbatch_option(name: str, value: str | None) -> str:
    """A flag as it stands in a `#SBATCH` line."""
    return f"--{name}" if value is None else f"--{name}={_for_sbatch(value)}"


def _for_sbatch(text: str) -> str:
    """A value in a `#SBATCH` line: read by rules of sbatch, and never by a shell."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
