"""`dtrain schema`: job.yaml for editors."""

from __future__ import annotations

import click

from dtrain.cli import options as shared


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of job.yaml, for completion and checks in editors.

    \b
    dtrain schema > job.schema.json
    # yaml-language-server: $schema=job.schema.json     as the first line of job.yaml
    """
    from dtrain.job.schema import job_schema

    shared.print_json(job_schema())
