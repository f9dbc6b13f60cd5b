"""`dtrain launch`: plan, then start exactly that plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.errors import UsageError

if TYPE_CHECKING:
    from dtrain.planning import Prepared


@click.command(
    "launch",
    cls=shared.LaunchCommand,
    examples=(
        (
            "dtrain launch --nodes 2 --procs 2 job.yaml",
            "Two nodes simulated on this machine, with two processes each.",
        ),
        ("dtrain launch --sweep args.lr=0.1,0.01 --sweep seed=0..4 job.yaml", "Ten runs."),
        ("dtrain launch --copy last --set args.lr=0.01", "A run again, with another value."),
        (
            "dtrain launch --launcher slurm --nodes 2 --gpus 4 job.yaml",
            "A batch job of two nodes with four GPUs each.",
        ),
    ),
)
@shared.job_argument
@shared.script_arguments
@shared.job_options
@shared.preflight_option
@shared.quiet_option
@shared.detach_option
@shared.dry_run_option
@shared.explain_option
@shared.json_option
@shared.option(
    shared.SWEEP,
    "--sweep",
    multiple=True,
    metavar="FIELD=V,V,…",
    help="Start a run for each value, or for each whole number of a range such as seed=0..4; "
    "repeated, for each combination.",
)
@shared.option(
    shared.SWEEP,
    "--sweep-file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Start a run for each item of this YAML list, for example {args.lr: 0.1, seed: 3}.",
)
@shared.option(
    shared.SWEEP,
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of all combinations, take N random ones. Ranges may then be of any numbers: "
    "args.lr=log(1e-5..1e-1).",
)
@shared.at_once_option
def command(
    job: str | None,
    dry_run: bool,
    explain: bool,
    as_json: bool,
    detach: bool,
    quiet: bool,
    sweep: tuple[str, ...],
    sweep_file: str | None,
    sample: int | None,
    at_once: int | None,
    **options: Any,
) -> int:
    """Train JOB, a job.yaml or a script, on one or more processes: on this machine, on other
    hosts, by Slurm or on Ray.

    Arguments of a script follow `--`.
    """
    from dtrain.cli.plan import show
    from dtrain.planning import plan_run

    is_sweep = bool(sweep or sweep_file)
    if (explain or as_json) and (is_sweep or not dry_run):
        text = "--explain and --json need --dry-run, and no --sweep"
        raise UsageError(text, code="usage.flag-without-effect")
    if is_sweep:
        from dtrain.cli import sweep as sweeps

        chosen = sweeps.choices(sweep, sweep_file, sample, options)
        if dry_run:
            sweeps.show(job, chosen, at_once, options)
            return 0
        return sweeps.launch(job, chosen, options, at_once=at_once, detach=detach, quiet=quiet)
    if at_once or sample:
        given = "--at-once" if at_once else "--sample"
        raise UsageError(f"{given} needs --sweep", code="usage.flag-without-effect")
    prepared = plan_run(shared.job_of(job, options), shared.request(options))
    if dry_run:
        show(prepared, as_json, explain)
        return 0
    return start(prepared, quiet, detach)


def start(prepared: Prepared, quiet: bool, detach: bool = False) -> int:
    """Start a plan, and follow it to its end unless `detach` is set. Return the exit code."""
    from dtrain.console.live import LiveConsole
    from dtrain.launchers.supervise import drive

    prepared.refuse_unlaunchable(detach)
    plan, job = prepared.plan, prepared.job
    console = LiveConsole(plan, quiet=quiet)
    return drive(prepared.launcher, plan, job.spec, job.text, console, detach=detach)
