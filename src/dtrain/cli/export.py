"""`dtrain export`: a run's model for other programs."""

from __future__ import annotations

import click

from dtrain import catalog
from dtrain.cli import options as shared
from dtrain.run.lookup import find


@click.command("export")
@shared.run_argument
@shared.runs_option
@click.option("--to", required=True, type=click.Choice(list(catalog.EXPORTS)), help="The format.")
@click.option("--step", type=int, help="Checkpoint of that step; the newest good one unless said.")
@click.option("--averaged", is_flag=True, help="The weights that dtrain.EMA has averaged.")
@click.option("-o", "--output", metavar="FILE", help="Where to; RUN-STEP with the format's suffix.")
def command(
    run: str, runs: str, to: str, step: int | None, averaged: bool, output: str | None
) -> int:
    """Write the model of RUN (an id, a unique prefix, or `last`), and check that it is the same."""
    import os
    import subprocess
    import sys

    from dtrain.errors import UsageError

    found = find(run, runs)
    problem = catalog.EXPORTS[to].needs.problem(f"--to {to}")
    if problem is not None:
        raise UsageError(problem)
    argv = [sys.executable, "-P", "-m", "dtrain.export", str(found.path), "--to", to]
    argv += ["--step", str(step)] if step is not None else []
    argv += ["--averaged"] if averaged else []
    argv += ["--output", output] if output is not None else []
    # a process of its own: nothing that this one imports may import torch
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    return subprocess.run(argv, env=environment, check=False).returncode
