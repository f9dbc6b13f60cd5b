"""Hand a batch job to Slurm, and say what it was that Slurm did not like."""

from __future__ import annotations

import re
import shlex

from dtrain.errors import PlanError
from dtrain.launchers.slurm import script
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.queue import run_command
from dtrain.plan import LaunchPlan
from dtrain.run import files
from dtrain.run.backend_files import SlurmFiles

# what sbatch says → the options that it may be about; `slurm.X` is flag X among the further ones
_ABOUT = (
    (r"partition", ("partition",)),
    (r"account", ("account", "partition")),
    (r"qos", ("qos",)),
    (r"time", ("time",)),
    (r"memory|--mem\b", ("mem", "slurm.mem-per-cpu", "slurm.mem-per-gpu")),
    (r"generic resource|gres", ("gres", "gpus")),
    (r"feature", ("constraint",)),
    (r"reservation", ("reservation",)),
    (r"dependency", ("dependency",)),
    (r"node name", ("exclude", "slurm.nodelist")),
    (
        r"node configuration|node count|processors|cpu",
        ("gpus", "gres", "cpus_per_node", "mem", "nodes"),
    ),
)  # fmt: skip


def command(plan: LaunchPlan, *more: str) -> list[str]:
    """The sbatch command of a plan."""
    folder = SlurmFiles(plan.run)
    output = f"--output={script.pattern(folder.log)}"
    return ["sbatch", "--parsable", *more, output, str(folder.script)]


def write(plan: LaunchPlan) -> None:
    """Make a place for the job's logs, and write the batch script unless submitit writes one."""
    folder = SlurmFiles(plan.run)
    folder.path.mkdir(parents=True, exist_ok=True)
    for wish in folder.path.glob(folder.requeue("*").name):
        wish.unlink(missing_ok=True)
    if SlurmOptions.of(plan.options).submit == "sbatch":
        files.write_atomic(folder.script, script.render(plan), mode=0o755)


def submit(plan: LaunchPlan) -> str:
    """Submit the written script; the job's id.

    Raises:
        PlanError: Slurm refuses the job; says why in Slurm's words, and where that is written.
    """
    done = run_command(*command(plan))
    if done.returncode != 0:
        raise PlanError(refusal(plan, done.stderr))
    return done.stdout.strip().partition(";")[0]


def test(plan: LaunchPlan, text: str) -> str:
    """What Slurm says of a plan's script without taking it: when and where, or why not."""
    done = run_command("sbatch", "--test-only", input_text=text)
    if done.returncode != 0:
        return refusal(plan, done.stderr)
    said = re.sub(r"^sbatch: Job \d+ ", "", done.stderr.strip())
    return f"Slurm would take it: {said}"


def refusal(plan: LaunchPlan, said: str) -> str:
    """Slurm's reason, and the place of the option that it is about."""
    lines = [re.sub(r"^(sbatch: )?(error: )?", "", line) for line in said.strip().splitlines()]
    reasons = [line.removeprefix("Batch job submission failed: ") for line in lines if line]
    reason = "; ".join(dict.fromkeys(reasons)) or "no reason given"
    return f"Slurm refuses the job: {reason}{about(plan, reason)}"


def about(plan: LaunchPlan, reason: str) -> str:
    """`\\n  FILE:LINE:COLUMN: OPTION: VALUE` for each option that a reason may be about."""
    further = {
        f"slurm.{flag}": f"--{flag.replace('_', '-')}"
        for flag in SlurmOptions.of(plan.options).slurm
    }
    said = [name for name, flag in further.items() if flag in reason]
    guesses = [options for pattern, options in _ABOUT if re.search(pattern, reason, re.IGNORECASE)]
    for options in (said, *guesses):
        named = [place for name in options if (place := place_of(plan, name))]
        if named:
            return "".join(f"\n  {place}" for place in named)
    return ""


def place_of(plan: LaunchPlan, name: str) -> str | None:
    """Where an option of a plan was written, and what; None when nobody wrote it."""
    source = plan.sources.get(name)
    if source is None or source == "default":
        return None
    options = SlurmOptions.of(plan.options)
    further = {f"slurm.{flag}": value for flag, value in options.slurm.items()}
    known = {"gpus": plan.gpus_per_node or None, "nodes": plan.nodes, **further}
    value = known.get(name, getattr(options, name, None))
    if value in (None, {}, []):
        return None
    return f"{source}: {name.removeprefix('slurm.')}: {shlex.quote(str(value))}"
