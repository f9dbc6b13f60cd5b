"""`dtrain resume`: the next attempt of a run."""

from __future__ import annotations

from typing import Any

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.errors import UsageError
from dtrain.run.lookup import find


@click.command(
    "resume",
    cls=shared.LaunchCommand,
    examples=(
        ("dtrain resume", "Continue the run that was started last."),
        ("dtrain resume digits-4f --procs 4", "Continue a run with four processes per node."),
        ("dtrain resume digits-k3 --at-once 2", "The runs of a sweep that have not succeeded."),
        ("dtrain resume last --launcher slurm --gpus 4", "Continue a run on another launcher."),
    ),
)
@shared.run_argument
@shared.option(
    shared.WHERE,
    "--launcher",
    metavar="NAME",
    shell_complete=completers.profiles,
    help="Continue the run there.  [default: where it was launched]",
)
@shared.size_options
@shared.preflight_option
@shared.quiet_option
@shared.detach_option
@shared.dry_run_option
@shared.explain_option
@shared.json_option
@shared.at_once_option
def command(
    run: str,
    dry_run: bool,
    explain: bool,
    as_json: bool,
    detach: bool,
    quiet: bool,
    at_once: int | None,
    **options: Any,
) -> int:
    """Continue RUN (an id, a unique prefix, or `last`) from its newest intact checkpoint.

    All settings stay as launched unless a flag changes them, for example --procs 4. The id of a
    sweep continues all of its runs that have not succeeded.
    """
    from dtrain.cli.launch import start
    from dtrain.cli.plan import show
    from dtrain.resuming import plan_resume
    from dtrain.sweeping.sweep import find_sweep

    if (explain or as_json) and not dry_run:
        text = "--explain and --json need --dry-run"
        raise UsageError(text, code="usage.flag-without-effect")
    request = shared.request(options)
    if (found := find_sweep(run, options["runs"])) is not None:
        from dtrain.cli import sweep as sweeps

        if dry_run:
            text = f"{found.id} is a sweep; --dry-run needs one of its runs"
            raise UsageError(text, code="usage.flag-without-effect")
        return sweeps.resume(found, request, at_once=at_once, detach=detach, quiet=quiet)
    if at_once:
        raise UsageError("--at-once needs a sweep", code="usage.flag-without-effect")
    prepared = plan_resume(find(run, options["runs"]), request)
    if dry_run:
        show(prepared, as_json, explain)
        return 0
    return start(prepared, quiet, detach)
