"""`dtrain launch`: plan, then start exactly that plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared

if TYPE_CHECKING:
    from dtrain.planning import Prepared


@click.command("launch", cls=shared.LaunchCommand)
@click.argument("job")
@shared.script_arguments
@shared.job_options
@click.option("--dry-run", "--dryrun", is_flag=True, help="Show the plan and start nothing.")
@click.option("--explain", is_flag=True, help="With --dry-run: where each value came from.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
@click.option("--detach", is_flag=True, help="Submit and return; for launchers slurm and ray.")
@click.option("-q", "--quiet", is_flag=True, help="Show only the end and what went wrong.")
@click.option(
    "--array",
    multiple=True,
    metavar="FIELD=V,V,…",
    help="Launcher slurm: a run for each value, as one array; may be repeated.",
)
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many runs of an --array may run at a time.",
)
def command(
    job: str,
    dry_run: bool,
    explain: bool,
    as_json: bool,
    detach: bool,
    quiet: bool,
    array: tuple[str, ...],
    at_once: int | None,
    **options: Any,
) -> int:
    """Train JOB (a job.yaml, or a script): as one process or many, here or elsewhere.

    What follows `--` is the command line of a script.
    """
    from dtrain.cli.plan import show
    from dtrain.planning import plan_run

    if (explain or as_json) and (array or not dry_run):
        raise click.UsageError("--explain and --json are of --dry-run for one run")
    if array:
        from dtrain.cli import array as arrays

        if dry_run:
            arrays.show(job, array, at_once, options)
            return 0
        return arrays.launch(job, array, options, at_once=at_once, detach=detach, quiet=quiet)
    if at_once:
        raise click.UsageError("--at-once is for runs of an --array, and there is none")
    prepared = plan_run(job, shared.request(options))
    if dry_run:
        show(prepared, as_json, explain)
        return 0
    return start(prepared, quiet, detach)


def start(prepared: Prepared, quiet: bool, detach: bool = False) -> int:
    """Start a plan and follow it to its end, or only start it; the exit code."""
    from dtrain.console.live import LiveConsole
    from dtrain.launchers.supervise import drive

    prepared.refuse_unlaunchable(detach)
    plan, job = prepared.plan, prepared.job
    console = LiveConsole(plan, quiet=quiet)
    return drive(prepared.launcher, plan, job.spec, job.text, console, detach=detach)
