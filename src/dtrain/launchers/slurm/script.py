"""Write the batch script of a plan: its flags and commands, all of it quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from dtrain.assets import asset_dir
from dtrain.errors import PlanError, quoted
from dtrain.job.units import parse_duration
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.slurm import templates
from dtrain.launchers.slurm.options import FLAGS, SlurmOptions, own_flag_problem
from dtrain.run.backend_files import SlurmFiles
from dtrain.words import few

_WAIT_S = 10
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]-]*")
_OWN = ("job-name", "comment")  # flags that may differ between elements of an array

_TEARDOWN = """\
status=$?

# The first agent creates this file if the training is to continue in another attempt. If another
# node has failed, srun asks the first agent to exit too; then the job is not requeued.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
if [ "$status" = 0 ] &&
  [ -e REQUEUE_FILE"${SLURM_RESTART_COUNT:-0}" ] &&
  [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then
  scontrol requeue "$job"
fi
exit "$status"
"""

SbatchFlag = tuple[str, str | None]
"""The long name of a flag of sbatch, and its value. None means a flag without a value."""


def render(plan: LaunchPlan) -> str:
    """Return the whole script, from the packaged template or the user's own.

    Values for a template are quoted for the position where they are used.

    Raises:
        PlanError: jinja2 is not installed, or the template cannot be read or filled.
    """
    nodes = nodes_as_shell(plan)
    values = {
        "run_id": one_line(plan.run_id),
        "sbatch_options": [sbatch_option(*flag) for flag in flags(plan)],
        "setup_lines": setup_lines(plan),
        "srun_arguments": [
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            *map(shlex.quote, srun_arguments(plan)),
        ],
        "agent_command": shlex.join(agent_command(plan)),
        "teardown_lines": teardown_lines(shlex.quote(str(SlurmFiles(plan.run).requeue("")))),
    }
    template = SlurmOptions.of(plan.options).template or asset_dir("slurm") / "job.sbatch.j2"
    return templates.fill(Path(template).expanduser(), values)


def flags(plan: LaunchPlan) -> list[SbatchFlag]:
    """Return every flag of sbatch except its output files.

    Raises:
        PlanError: one of `slurm:` is dtrain's own, or a value has a line break.
    """
    options = SlurmOptions.of(plan.options)
    comment = f"dtrain run {plan.run_id}"
    found: list[SbatchFlag] = [
        ("job-name", plan.run_id),
        ("comment", f"{comment} {options.comment}" if options.comment else comment),
        ("nodes", str(plan.nodes) if _is_fixed(plan) else f"{plan.min_nodes}-{plan.nodes}"),
        # with it, Slurm gives the fewest nodes of a range, regardless of how many are free
        *([("ntasks-per-node", "1")] if _is_fixed(plan) else []),
        ("cpus-per-task", str(_cpus_per_node(plan))),
    ]
    if plan.gpus_per_node and not options.gres:
        found.append(("gpus-per-node", str(plan.gpus_per_node)))
    found += [(flag, value) for flag in FLAGS if (value := getattr(options, flag)) is not None]
    if options.mail:
        found += [("mail-user", options.mail), ("mail-type", "END,FAIL,REQUEUE")]
    found += [
        ("signal", f"USR2@{_signal_before(options)}"),
        ("requeue" if options.requeue else "no-requeue", None),
        ("open-mode", "append"),
        *_further_flags(plan, options),
    ]
    for name, value in found:
        if value is not None and not value.isprintable():
            raise PlanError(
                f"--{name} {quoted(value)}: a batch script cannot contain a line break here",
                code="slurm.line-break",
            )
    return found


def shared_options(plan: LaunchPlan) -> list[str]:
    """Return the flags that all elements of an array must share, in the form of `#SBATCH` lines."""
    return [sbatch_option(*flag) for flag in flags(plan) if flag[0] not in _OWN]


def _signal_before(options: SlurmOptions) -> int:
    """Return seconds before the time limit, at most half of it, so that workers can progress."""
    limit = parse_duration(options.time) if options.time else float("inf")
    return max(1, int(min(options.signal_before, limit / 2)))


def _further_flags(plan: LaunchPlan, options: SlurmOptions) -> list[SbatchFlag]:
    found: list[SbatchFlag] = []
    for name, value in options.slurm.items():
        flag = name.lstrip("-").replace("_", "-")
        problem = own_flag_problem(flag)
        if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
            problem = "is not the long name of an sbatch flag"
        if problem:
            source = plan.sources.get(f"slurm.{name}", "option")
            raise PlanError(f"{source}: {quoted(name)} {problem}", code="slurm.flag-not-allowed")
        for each in value if isinstance(value, list) else [value]:
            if each is not False:
                found.append((flag, None if each is True else str(each)))
    return found


def _cpus_per_node(plan: LaunchPlan) -> int:
    """Return the number of CPUs that a node's agent and all of its workers share."""
    return SlurmOptions.of(plan.options).cpus_per_node or plan.procs_per_node * plan.replicas


def setup_lines(plan: LaunchPlan) -> list[str]:
    """Return the shell lines before srun, which prepare the environment of the agents."""
    options = SlurmOptions.of(plan.options)
    lines = list(options.setup)
    if options.modules:
        lines.append(f"module load {shlex.join(options.modules)}")
    if options.conda:
        lines.append("conda_base=$(conda info --base)")
        lines.append('. "$conda_base/etc/profile.d/conda.sh"')
        lines.append(f"conda activate {shlex.quote(options.conda)}")
    if options.venv:
        lines.append(f". {shlex.quote(options.venv + '/bin/activate')}")
    wait = "trap : TERM USR2 # the agents exit cleanly, and the shell waits for them"
    return ["set -e", *lines, "set +e", "", wait] if lines else [wait]


def teardown_lines(requeue_file: str) -> list[str]:
    """Return the lines after srun, which put a job that is to continue back into the queue.

    Args:
        requeue_file: the path of the run's requeue file (`SlurmFiles.requeue`) without the number,
            in shell syntax.
    """
    return _TEARDOWN.replace("REQUEUE_FILE", requeue_file).splitlines()


def _is_fixed(plan: LaunchPlan) -> bool:
    return plan.min_nodes == plan.nodes


def nodes_as_shell(plan: LaunchPlan) -> str:
    """Return the number of nodes for srun. For an elastic job, it is the number this attempt
    got."""
    return str(plan.nodes) if _is_fixed(plan) else '"$SLURM_JOB_NUM_NODES"'


def srun_arguments(plan: LaunchPlan) -> list[str]:
    """Return srun's arguments for one agent per node, with all CPUs of the node.

    srun does not take the CPUs from the job.
    """
    options = SlurmOptions.of(plan.options)
    found = [
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus_per_node(plan)}",
        "--kill-on-bad-exit=1",
        # all end together; without it srun waits forever for a node whose step daemon was killed
        f"--wait={int(plan.stop_timeout_s) + _WAIT_S}",
    ]
    if options.pyxis:
        mounts = ",".join(f"{folder}:{folder}" for folder in _shared_folders(plan))
        found += [f"--container-image={options.pyxis}", f"--container-mounts={mounts}"]
        found += options.container_args
    return found


def agent_command(plan: LaunchPlan) -> list[str]:
    options = SlurmOptions.of(plan.options)
    command = [options.python or "python", "-P", "-m", "dtrain.node", plan.run_dir]
    command += ["--placement", "slurm"]
    if not options.apptainer:
        return command
    binds = [part for folder in _shared_folders(plan) for part in ("--bind", folder)]
    return ["apptainer", "exec", *binds, *options.container_args, options.apptainer, *command]


def _shared_folders(plan: LaunchPlan) -> list[str]:
    """Return the directories that a container must see in addition to its own files."""
    return list(dict.fromkeys((str(plan.run.path), plan.job_dir)))


def pattern(path: Path) -> str:
    """Return a path as a file name pattern of Slurm, with `%` escaped.

    Raises:
        PlanError: it contains a backslash, which disables all patterns.
    """
    if "\\" in str(path):
        raise PlanError(
            f"Slurm cannot write to a path with a backslash: {path}; use --runs DIR",
            code="slurm.path-not-usable",
        )
    return str(path).replace("%", "%%")


def one_line(text: str) -> str:
    """Return a text for a comment of a script. A line break would end the comment."""
    return text if text.isprintable() else quoted(text)


def sbatch_option(name: str, value: str | None) -> str:
    """Return a flag for a `#SBATCH` line. sbatch parses the line by its own rules, without a
    shell."""
    if value is None or _PLAIN.fullmatch(value):
        return f"--{name}" if value is None else f"--{name}={value}"
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'--{name}="{escaped}"'


def array_id(plans: Sequence[LaunchPlan]) -> str:
    """Return the common prefix of the ids of all runs of an array: element k is `ID-k`."""
    return plans[0].run_id.rpartition("-")[0]


def array_numbers(plans: Sequence[LaunchPlan]) -> list[int]:
    """Return the number of each element, which its run's id ends with."""
    return [int(plan.run_id.rpartition("-")[2]) for plan in plans]


def array_runs(plans: Sequence[LaunchPlan]) -> str:
    ids = [plan.run_id for plan in plans]
    return f"{ids[0]} to {ids[-1]}" if _is_unbroken(array_numbers(plans)) else few(ids)


def array_spec(plans: Sequence[LaunchPlan], at_once: int | None) -> str:
    """Return the value of `--array`: `0-2%2`, or `0,2,5` where some runs of a sweep have ended."""
    numbers = array_numbers(plans)
    listed = ",".join(map(str, numbers))
    spec = f"{numbers[0]}-{numbers[-1]}" if _is_unbroken(numbers) else listed
    return spec + (f"%{at_once}" if at_once else "")


def _is_unbroken(numbers: Sequence[int]) -> bool:
    return len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))


def array_logs(plans: Sequence[LaunchPlan]) -> str:
    """Return the pattern of the files to which Slurm writes the output of each element's script."""
    run, log = plans[0].run.path, SlurmFiles(plans[0].run).log
    folder = pattern(run.with_name(array_id(plans)))
    return f"{folder}-%a/{log.relative_to(run)}"


def path_in_array(plans: Sequence[LaunchPlan], path: Path) -> str:
    """Return a path in the first element's run directory as shell code for each element's own
    path."""
    run = plans[0].run.path
    folder = shlex.quote(f"{run.with_name(array_id(plans))}-")
    return f'{folder}"$SLURM_ARRAY_TASK_ID"/{path.relative_to(run)}'
