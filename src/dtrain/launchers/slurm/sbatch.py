"""`submit: sbatch` with dtrain's own scripts, and the causes of Slurm's refusals."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence

from dtrain.errors import PlanError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.slurm import script
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.queue import run_command
from dtrain.run import files
from dtrain.run.backend_files import SlurmFiles

# sbatch's message → the options that it may be about; `slurm.X` is flag X among the further ones
_ABOUT_CODES = (
    (r"(?<!/)partition", "slurm.partition-invalid", ("partition",)),
    (r"account", "slurm.account-invalid", ("account", "partition")),
    (r"qos", "slurm.qos-invalid", ("qos",)),
    (r"time", "slurm.time-invalid", ("time",)),
    (
        r"memory|--mem\b",
        "slurm.memory-invalid",
        ("mem", "slurm.mem-per-cpu", "slurm.mem-per-gpu"),
    ),
    (r"generic resource|gres", "slurm.gres-invalid", ("gres", "gpus")),
    (r"feature", "slurm.constraint-invalid", ("constraint",)),
    (r"reservation", "slurm.reservation-invalid", ("reservation",)),
    (r"dependency", "slurm.dependency-invalid", ("dependency",)),
    (r"node name", "slurm.node-name-invalid", ("exclude", "slurm.nodelist")),
    (
        r"node configuration|node count|processors|cpu",
        "slurm.nodes-not-available",
        ("gpus", "gres", "cpus_per_node", "mem", "nodes"),
    ),
)  # fmt: skip
"""A pattern of Slurm's reason, its code, and the options that it may be about."""


class Sbatch:
    """A submitter of one script per run, or for an array, of one that starts each element's
    script."""

    def command(self, plan: LaunchPlan) -> list[str]:
        folder = SlurmFiles(plan.run)
        return [
            "sbatch",
            "--parsable",
            f"--output={script.pattern(folder.log)}",
            str(folder.script),
        ]

    def files(self, plan: LaunchPlan) -> tuple[str, ...]:
        return (str(SlurmFiles(plan.run).script),)

    def shared_flags(self, plan: LaunchPlan) -> list[str]:
        return script.shared_options(plan)

    def render(self, plan: LaunchPlan) -> str:
        return script.render(plan)

    def submit(self, plan: LaunchPlan) -> str:
        _write(plan)
        return _submit(plan, self.command(plan))

    def render_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> str:
        runs = script.array_runs(plans)
        own = [
            ("job-name", script.array_id(plans)),
            ("comment", f"dtrain runs {runs}"),
            ("array", script.array_spec(plans, at_once)),
        ]
        options = [script.sbatch_option(*flag) for flag in own] + script.shared_options(plans[0])
        lines = [f"#SBATCH {option}" for option in options]
        about = f"# Runs {script.one_line(runs)} of dtrain: each has its own script."
        start = f"exec {script.path_in_array(plans, SlurmFiles(plans[0].run).script)}"
        return "\n".join(["#!/bin/bash", about, *lines, "", start, ""])

    def submit_array(self, plans: Sequence[LaunchPlan], at_once: int | None) -> list[str]:
        for plan in plans:
            _write(plan)
        path = SlurmFiles(plans[0].run).array_script
        files.write_atomic(path, self.render_array(plans, at_once), mode=0o755)
        output = f"--output={script.array_logs(plans)}"
        array = _submit(plans[0], ["sbatch", "--parsable", output, str(path)])
        return [f"{array}_{number}" for number in script.array_numbers(plans)]


def _write(plan: LaunchPlan) -> None:
    files.write_atomic(SlurmFiles(plan.run).script, script.render(plan), mode=0o755)


def _submit(plan: LaunchPlan, command: list[str]) -> str:
    done = run_command(*command)
    if done.returncode != 0:
        raise refusal(plan, done.stderr)
    return done.stdout.strip().partition(";")[0]


def test_only(plan: LaunchPlan, text: str) -> list[str]:
    """Return Slurm's answer about a script without submitting it, or nothing without Slurm here."""
    if shutil.which("sbatch") is None:
        return []
    try:
        answer = f"Slurm would accept the job: {tested(plan, text)}"
    except PlanError as error:
        answer = str(error)
    return ["Slurm's answer", *(f"  {line}" for line in answer.splitlines())]


def tested(plan: LaunchPlan, text: str) -> str:
    """Return when and where Slurm would start a script. Nothing is submitted.

    Raises:
        PlanError: Slurm would refuse it.
    """
    done = run_command("sbatch", "--test-only", input_text=text)
    if done.returncode != 0:
        raise refusal(plan, done.stderr)
    return re.sub(r"^sbatch: Job \d+ ", "", done.stderr.strip())


def refusal(plan: LaunchPlan, stderr: str) -> PlanError:
    """Return the error with Slurm's reason, and the location of the option that it is about."""
    lines = [re.sub(r"^(sbatch: )?(error: )?", "", line) for line in stderr.strip().splitlines()]
    reasons = [line.removeprefix("Batch job submission failed: ") for line in lines if line]
    reason = "; ".join(dict.fromkeys(reasons)) or "no reason given"
    if re.search(r"resolve_ctls|fetch_config|contact slurm controller", reason, re.IGNORECASE):
        text = f"no Slurm cluster answers; run this on a login node of the cluster. Slurm: {reason}"
        return PlanError(text, code="slurm.no-cluster")
    sources = "".join(f"\n  {source}" for source in _sources(plan, reason))
    codes = [code for pattern, code, _ in _ABOUT_CODES if re.search(pattern, reason, re.IGNORECASE)]
    code = codes[0] if codes else "slurm.refused"
    return PlanError(f"Slurm refuses the job: {reason}{sources}", code=code)


def _sources(plan: LaunchPlan, reason: str) -> list[str]:
    """Return `FILE:LINE:COLUMN: OPTION: VALUE` of each option that a reason may be about."""
    further = SlurmOptions.of(plan.options).slurm
    named = [f"slurm.{flag}" for flag in further if f"--{flag.replace('_', '-')}" in reason]
    guesses = [
        options for pattern, _, options in _ABOUT_CODES if re.search(pattern, reason, re.IGNORECASE)
    ]
    for options in (named, *guesses):
        if found := [source for name in options if (source := source_of(plan, name))]:
            return found
    return []


def source_of(plan: LaunchPlan, name: str) -> str | None:
    """Return the location and value of an option of a plan, or None when it was not written."""
    source = plan.sources.get(name)
    if source is None or source == "default":
        return None
    options = SlurmOptions.of(plan.options)
    further = {f"slurm.{flag}": value for flag, value in options.slurm.items()}
    known = {"gpus": plan.gpus_per_node or None, "nodes": plan.nodes, **further}
    value = known.get(name, getattr(options, name, None))
    if value in (None, {}, []):
        return None
    label = "" if source.endswith(f" {name}") else f"{name.removeprefix('slurm.')}: "
    return f"{source}: {label}{shlex.quote(str(value))}"
