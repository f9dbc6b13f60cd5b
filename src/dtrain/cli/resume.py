"""`dtrain resume`: the next attempt of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import options as shared
from dtrain.errors import UsageError
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.planning import Request
    from dtrain.run.rundir import RunDir


@click.command(
    "resume",
    cls=shared.LaunchCommand,
    examples=(
        ("dtrain resume", "Go on with the run that was started last."),
        ("dtrain resume digits-4f --procs 4", "Go on with a run, on four processes."),
    ),
)
@shared.run_argument
@shared.size_options
@shared.quiet_option
@shared.detach_option
@shared.dry_run_option
@shared.explain_option
@shared.json_option
def command(
    run: str,
    dry_run: bool,
    explain: bool,
    as_json: bool,
    detach: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Continue RUN (an id, a unique prefix, or `last`) from its newest intact checkpoint.

    All settings stay as launched unless a flag changes them, for example --procs 4.
    """
    from dtrain.cli.launch import start
    from dtrain.cli.plan import show
    from dtrain.planning import plan_attempt

    if (explain or as_json) and not dry_run:
        text = "--explain and --json need --dry-run"
        raise UsageError(text, code="usage.flag-without-effect")
    found = find(run, options["runs"])
    asked = shared.request(options)
    _check(found, asked)
    _refuse_without_effect(options["overrides"])
    prepared = plan_attempt(found, asked)
    spec = prepared.job.spec
    _refuse_to_end_before(found, spec.train.steps if spec.script is None else None)
    if dry_run:
        show(prepared, as_json, explain)
        return 0
    return start(prepared, quiet, detach)


def _check(run: RunDir, asked: Request) -> None:
    """Refuse what makes no sense for a run that stands as this one.

    Of several commands, one a node, only node 0's decides.
    """
    from dtrain.launchers import status
    from dtrain.run.attempts import Handle, Held

    if (rank := asked.options.get("node_rank")) and rank.value != "0":
        return
    state, _ = status.state_of(run)
    if state == "running":
        raise Held(run, Handle.read(run))
    if state == "succeeded" and not any(text.startswith("train") for text in asked.overrides):
        raise UsageError(
            f"run {run.id} has finished; to train on, give it a new end, for example "
            "--set train.epochs=20",
            code="run.finished",
        )


def _refuse_without_effect(overrides: Iterable[str]) -> None:
    """Refuse settings that only a new run can have."""

    why = {
        "name": "a run keeps its name",
        "checks.inject": "faults are made in a run's first attempt only",
    }
    for text in overrides:
        field = text.partition("=")[0].strip()
        if field in why:
            raise UsageError(
                f"--set {field} has no effect here: {why[field]}; launch a new run",
                code="run.setting-without-effect",
            )


def _refuse_to_end_before(run: RunDir, end: int | None) -> None:
    """Refuse an end that the newest checkpoint is past; the workers see to one given in epochs."""

    names = (path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*"))
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    if end is not None and end < newest:
        raise UsageError(
            f"run {run.id} has a checkpoint of step {newest}, which is past train.steps={end}; "
            "give it a later end",
            code="run.end-passed",
        )
