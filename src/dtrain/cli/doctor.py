"""`dtrain doctor`: check this host, a job and a cluster before a launch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.console import out


@click.command(
    "doctor",
    cls=shared.LaunchCommand,
    examples=(
        ("dtrain doctor", "This machine: cores, GPUs, limits, disk, network."),
        ("dtrain doctor --procs 4 job.yaml", "Also the job, and what it asks of this machine."),
        ("dtrain doctor --launcher slurm --nodes 2 job.yaml", "Also whether Slurm takes it."),
    ),
)
@click.argument("job", required=False, shell_complete=completers.files)
@shared.script_arguments
@shared.job_options
@shared.json_option
def command(job: str | None, as_json: bool, **options: Any) -> int:
    """Check this host, and what a launch of JOB needs; start nothing.

    Each line is `ok`, a `warning`, or a `problem` with what mends it. The exit code is 1 if there
    is a problem. `dtrain launch --preflight` makes the same checks on the nodes of a launch.
    """
    from dtrain.diagnosing import diagnose
    from dtrain.doctor import diagnosis

    found = []
    given = shared.job_of(job, options) if job or options["copy"] else None
    for each in diagnose(given, shared.request(options)):
        found.append(each)
        if not as_json:
            click.echo("\n".join(diagnosis.lines(each, out.width(), out.paint)))
    worst = diagnosis.worst(found)
    if as_json:
        shared.print_json({"status": worst, "checks": [asdict(each) for each in found]})
    else:
        click.echo(diagnosis.summary(found))
    return int(worst == diagnosis.PROBLEM)
