"""A time limit above that of the partition: the job goes on over as many attempts as it needs."""

from __future__ import annotations

from dataclasses import replace

from dtrain.errors import LaunchError
from dtrain.job.units import parse_duration
from dtrain.launchers.slurm.options import SlurmOptions, as_slurm_writes
from dtrain.launchers.slurm.queue import run_command
from dtrain.plan import LaunchPlan


def within_partition(plan: LaunchPlan) -> tuple[LaunchPlan, str]:
    """The plan with a time limit that its partition gives, and a line that says so, if it was cut.

    Of several partitions the one with the longest limit counts. A plan without a time limit, one
    that may not be requeued, and one whose partitions Slurm does not tell of stay as they are:
    Slurm then says itself what it does not like.
    """
    options = SlurmOptions.of(plan.options)
    asked = options.time
    if asked is None or not options.requeue:
        return plan, ""
    limits = _limits(options.partition)
    if not limits:
        return plan, ""
    name, longest = max(limits.items(), key=lambda limit: limit[1])
    if parse_duration(asked) <= longest:
        return plan, ""
    cut = as_slurm_writes(int(longest))
    said = (
        f"partition {name} gives {cut} at a time, not {asked}: the job goes on over as many "
        f"attempts as it needs, at most {options.requeue + 1}"
    )
    return with_time(plan, cut), said


def with_time(plan: LaunchPlan, time: str | None) -> LaunchPlan:
    options = SlurmOptions.of(plan.options)
    return replace(plan, options=options.model_copy(update={"time": time}))


def _limits(wanted: str | None) -> dict[str, float]:
    """Seconds that a job may take on each partition it may use; empty when Slurm does not say."""
    try:
        listed = run_command("scontrol", "show", "partition", "--oneliner")
    except LaunchError:
        return {}
    if listed.returncode != 0:
        return {}
    limits = {}
    for line in listed.stdout.splitlines():
        fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        name = fields.get("PartitionName", "")
        if name in wanted.split(",") if wanted else fields.get("Default") == "YES":
            limits[name] = seconds_of(fields.get("MaxTime", ""))
    return limits


def seconds_of(limit: str) -> float:
    """Seconds of a limit as Slurm writes it, `[D-]HH:MM:SS` or `UNLIMITED`."""
    try:
        return parse_duration(limit)
    except ValueError:
        return float("inf")
