"""`dtrain bench`: how fast the parts of a training are."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import click

from dtrain.cli import completers
from dtrain.cli import options as shared


@click.command(
    "bench",
    cls=shared.LaunchCommand,
    examples=(
        ("dtrain bench --nodes 2 --procs 2", "Collectives, links and the store."),
        ("dtrain bench --procs 2 job.yaml", "Also the loader and the steps of a job."),
        ("dtrain bench --launcher slurm --nodes 4 --gpus 8 --only links", "The slow link."),
    ),
)
@click.argument("job", required=False, shell_complete=completers.files)
@shared.script_arguments
@shared.job_options
@shared.option(
    shared.WHAT,
    "--only",
    multiple=True,
    metavar="PART,…",
    help="Only these: collectives, links, store, loader, step; repeatable.",
)
@shared.option(
    shared.WHAT,
    "--steps",
    type=click.IntRange(min=2),
    default=100,
    show_default=True,
    metavar="N",
    help="Number of steps of the job that are trained.",
)
@shared.json_option
def command(
    job: str | None, only: tuple[str, ...], steps: int, as_json: bool, **options: Any
) -> None:
    """Measure the nodes of a launch and, with JOB, its loader and its steps; say what to change.

    It launches a program that measures collectives, the link from each node to each other, and the
    store; and the job for some steps, in a run of its own.
    """
    from dtrain.bench.results import advice
    from dtrain.bench.session import bench, chosen

    parts = chosen(only)
    given = shared.job_of(job, options) if job or options["copy"] else None
    found = bench(given, shared.request(options), parts, steps, partial(click.echo, err=True))
    if as_json:
        shared.print_json({**asdict(found), "advice": advice(found)})
        return
    from rich.console import Console

    from dtrain.bench.text import shown

    console = Console(highlight=False, soft_wrap=False)
    for each in shown(found):
        console.print(each)
