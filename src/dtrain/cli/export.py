"""`dtrain export`: a run's model for other programs."""

from __future__ import annotations

import click

from dtrain import catalog
from dtrain.cli import options as shared
from dtrain.run.lookup import find


@click.command(
    "export",
    cls=shared.Command,
    examples=(
        ("dtrain export --to safetensors", "Write the model of the newest run."),
        (
            "dtrain export --to onnx --step 200 digits-4f",
            "Write the model as it was after step 200.",
        ),
    ),
)
@shared.run_argument
@shared.option(
    shared.WHAT, "--to", required=True, type=click.Choice(list(catalog.EXPORTS)), help="Format."
)
@shared.option(
    shared.WHAT,
    "--step",
    type=int,
    metavar="N",
    help="Step of the checkpoint.  [default: the newest intact]",
)
@shared.option(
    shared.WHAT, "--averaged", is_flag=True, help="Write the weights that dtrain.EMA averaged."
)
@shared.runs_option
@shared.option(
    shared.WHERE, "--output", metavar="FILE", help="File to write.  [default: RUN-STEP.SUFFIX]"
)
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
        raise UsageError(problem, code="plan.missing-package")
    argv = [sys.executable, "-P", "-m", "dtrain.export", str(found.path), "--to", to]
    argv += ["--step", str(step)] if step is not None else []
    argv += ["--averaged"] if averaged else []
    argv += ["--output", output] if output is not None else []
    # a separate process: this one must not import torch
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    return subprocess.run(argv, env=environment, check=False).returncode
