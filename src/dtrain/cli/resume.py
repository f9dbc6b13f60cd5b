"""`dtrain resume`: the next attempt of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.planning import Request
    from dtrain.run.rundir import RunDir


@click.command("resume", cls=shared.LaunchCommand)
@shared.run_argument
@shared.size_options
@click.option("--dry-run", "--dryrun", is_flag=True, help="Show the plan and start nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Show only the end and what went wrong.")
def command(run: str, dry_run: bool, quiet: bool, **options: Any) -> int:
    """Go on with RUN (an id, a unique prefix, or `last`) from its newest good checkpoint.

    The run goes on as it was launched; flags change what they name, as its size.
    """
    from dtrain.cli.launch import start
    from dtrain.cli.plan import show
    from dtrain.planning import plan_attempt

    found = find(run, options["runs"])
    asked = shared.request(options)
    _check(found, asked)
    _refuse_without_effect(options["overrides"])
    prepared = plan_attempt(found, asked)
    spec = prepared.job.spec
    _refuse_to_end_before(found, spec.train.steps if spec.script is None else None)
    if dry_run:
        show(prepared, as_json=False, explain=False)
        return 0
    return start(prepared, quiet)


def _check(run: RunDir, asked: Request) -> None:
    """Refuse what makes no sense for a run that stands as this one.

    Of several commands, one a node, only node 0's decides.
    """
    from dtrain.errors import UsageError
    from dtrain.launchers import status
    from dtrain.run.attempts import Handle, Held

    if asked.options.get("node_rank", "0") != "0":
        return
    state, _ = status.state_of(run)
    if state == "running":
        raise Held(run, Handle.read(run))
    if state == "succeeded" and not any(text.startswith("train") for text in asked.overrides):
        raise UsageError(
            f"run {run.id} has finished; to train on, give it a new end, as --set train.epochs=20"
        )


def _refuse_without_effect(overrides: Iterable[str]) -> None:
    """Refuse settings that only a new run can have."""
    from dtrain.errors import UsageError

    why = {
        "name": "a run keeps its name",
        "checks.inject": "faults are made in a run's first attempt only",
    }
    for text in overrides:
        field = text.partition("=")[0].strip()
        if field in why:
            raise UsageError(f"--set {field} has no effect here: {why[field]}; launch a new run")


def _refuse_to_end_before(run: RunDir, end: int | None) -> None:
    """Refuse an end that the newest checkpoint is past; the workers see to one given in epochs."""
    from dtrain.errors import UsageError

    names = (path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*"))
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    if end is not None and end < newest:
        raise UsageError(
            f"run {run.id} has a checkpoint of step {newest}, which is past train.steps={end}; "
            "give it a later end"
        )
