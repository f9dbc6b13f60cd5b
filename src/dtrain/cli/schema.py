"""`dtrain schema`: job.yaml for editors."""

from __future__ import annotations

import click

from dtrain.cli import options as shared


@click.command(
    "schema",
    cls=shared.Command,
    examples=(
        ("dtrain schema > job.schema.json", "Write the schema where an editor finds it."),
        (
            "# yaml-language-server: $schema=job.schema.json",
            "First line of a job.yaml that an editor is to check:",
        ),
    ),
)
def command() -> None:
    """Print the JSON Schema of job.yaml, for completion and checks in editors."""
    from dtrain.job.schema import job_schema

    shared.print_json(job_schema())
