"""`dtrain checkpoint prune`: remove the checkpoints that a run does not keep."""

from __future__ import annotations

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find


@click.command(
    "prune",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint prune --dry-run", "Show what would be removed of the newest run."),
        ("dtrain checkpoint prune digits-4f --keep 1", "Keep only the newest one, and the best."),
    ),
)
@shared.run_argument
@shared.option(
    shared.WHAT,
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of newest ones that stay.  [default: checkpoint.keep of the job]",
)
@shared.runs_option
@shared.option(shared.WATCH, "--dry-run", "--dryrun", is_flag=True, help="Remove nothing.")
@shared.json_option
def command(run: str, keep: int | None, runs: str, dry_run: bool, as_json: bool) -> None:
    """Remove the checkpoints of RUN (an id, a unique prefix, or `last`) that it does not keep.

    The newest stay, those that the job keeps as the best, `best` itself, and pinned ones. They are
    verified first: if none of them is intact, the newest intact one stays too.
    """
    from dtrain.checkpoints.pruning import prune
    from dtrain.words import counted, size

    done = prune(find(run, runs), keep, dry_run=dry_run)
    if as_json:
        verified = {name: each.to_json() for name, each in done.verified.items()}
        facts = {"dry_run": dry_run, "kept": done.kept, "removed": done.removed}
        shared.print_json({**facts, "verified": verified})
        return
    for name, reason in done.kept.items():
        result = done.verified[name]
        damage = "" if result.intact else f", but damaged: {result.damage[0].message}"
        click.echo(f"{name} stays: {reason}{damage}")
    removed = "would be removed" if dry_run else "removed"
    for name, freed in done.removed.items():
        click.echo(f"{name} {removed}: {size(freed)}")
    total = size(sum(done.removed.values()))
    click.echo(f"{counted(len(done.removed), 'checkpoint')} {removed}, {total} freed")
