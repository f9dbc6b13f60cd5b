"""`dtrain status`: how one run stands."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find


@click.command("status")
@shared.run_argument
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> None:
    """How RUN (an id, a unique prefix, or `last`) stands."""
    from dtrain.launchers.summary import summary

    row = summary(find(run, runs))
    if as_json:
        shared.print_json(row)
        return
    for name, value in row.items():
        if value not in (None, {}):
            click.echo(f"{name.replace('_', ' '):<18} {_text(name, value)}")


def _text(name: str, value: Any) -> str:
    if name in ("started", "ended"):
        from dtrain.run.files import local_time

        return local_time(value)
    if isinstance(value, dict):
        return "  ".join(f"{key} {number:.6g}" for key, number in value.items())
    return str(value)
