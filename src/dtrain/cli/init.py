"""`dtrain init`: write the files of a first job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli import completers
from dtrain.cli import options as shared
from dtrain.errors import PlanError, UsageError

if TYPE_CHECKING:
    from dtrain.initializing.existing import Existing
    from dtrain.initializing.place import Place
    from dtrain.initializing.proposal import Proposal, Wants

_LAUNCHERS = ("local", "torchrun", "slurm", "ray")


@click.command(
    "init",
    cls=shared.Command,
    examples=(
        ("dtrain init", "A first task, for this machine or its cluster."),
        (
            'dtrain init --from "torchrun --nproc-per-node 4 train.py --lr 0.1"',
            "A job of an existing command line.",
        ),
        ("dtrain init --from train.sbatch digits", "The job of a batch script, in a directory."),
    ),
)
@click.argument("directory", default=".", metavar="[DIR]", shell_complete=completers.files)
@shared.option(
    shared.WHAT,
    "--from",
    "source",
    metavar="FILE|LINE",
    shell_complete=completers.files,
    help="A torchrun line, a shell or sbatch script, or a Lightning script. It is read, not run.",
)
@shared.option(
    shared.SIZE, "-N", "--nodes", "--nnodes", metavar="N|MIN:MAX", help="Number of nodes."
)
@shared.option(
    shared.SIZE,
    "--procs",
    "--nproc-per-node",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes per node.",
)
@shared.option(
    shared.SIZE,
    "--gpus",
    "--gpus-per-node",
    type=click.IntRange(min=0),
    metavar="N",
    help="GPUs per node; 0 trains on the CPU.",
)
@shared.option(
    shared.WHERE,
    "--launcher",
    type=click.Choice(_LAUNCHERS),
    help="Where processes start.  [default: what is found]",
)
@shared.launcher_flags("partition", "account", "time", "address")
@shared.option(
    shared.MORE, "-y", "--yes", is_flag=True, help="Take all defaults without a question."
)
@shared.option(shared.MORE, "--force", is_flag=True, help="Overwrite files.")
def command(
    directory: str,
    source: str | None,
    nodes: str | None,
    procs: int | None,
    gpus: int | None,
    launcher: str | None,
    yes: bool,
    force: bool,
    **options: Any,
) -> None:
    """Write a job with a profile that fits this place, so that `dtrain launch` works at once.

    DIR gets task.py, job.yaml and launchers/NAME.yaml. Slurm, Ray and GPUs are looked for. On a
    terminal, the command asks what it cannot know; elsewhere it takes the defaults.
    """
    from dtrain.initializing import writing
    from dtrain.initializing.place import find_place
    from dtrain.initializing.proposal import Wants, propose
    from dtrain.initializing.reading import read

    folder = Path(directory)
    _check_nodes(nodes)
    given = shared.given_launcher_options(options)
    launcher = _launcher_of(given, launcher)
    existing = None if source is None else read(source, folder)
    chosen = launcher or (existing.launcher if existing else None)
    if not force:
        writing.refuse_existing(writing.targets(folder, chosen or "local", existing)[:-1])
    place = find_place(chosen, given.get("address"))
    click.echo("\n".join(place.lines()))
    wants = Wants(launcher, nodes, procs, gpus, given)
    if not yes and sys.stdin.isatty() and sys.stdout.isatty():
        wants = _ask(place, existing, wants)
    proposal = propose(place, existing, wants)
    if not force:
        writing.refuse_existing(writing.targets(folder, proposal.launcher, existing))
    written = writing.write(folder, writing.name_of(folder, existing), proposal, existing)
    click.echo(f"wrote {', '.join(map(str, written))}")
    if existing and existing.options and existing.launcher != proposal.launcher:
        names = ", ".join(existing.options)
        existing.leave_out("--from", names, f"options of launcher {existing.launcher}")
    for line in existing.left_out if existing else ():
        click.echo(f"not carried over: {line}")
    _check(folder, proposal)
    click.echo("\n".join(_next(folder, proposal)))


def _launcher_of(options: dict[str, str], launcher: str | None) -> str | None:
    """Return the launcher that flags choose: an option of one launcher implies it."""
    from dtrain.launchers.flags import FLAGS

    for each in FLAGS:
        if each.option in options:
            if launcher not in (None, each.launcher):
                raise PlanError(
                    f"{each.names[-1]} needs --launcher {each.launcher}; "
                    f"the launcher here is {launcher!r}",
                    code="usage.flag-of-other-launcher",
                )
            launcher = each.launcher
    return launcher


def _check_nodes(text: str | None) -> None:
    from dtrain.job.units import parse_nodes

    try:
        low = parse_nodes(text)[0] if text is not None else 1
    except ValueError as error:
        raise UsageError(f"--nodes: {error}", code="usage.invalid-value") from None
    if low < 1:
        raise UsageError("--nodes: at least one node is needed", code="usage.invalid-value")


def _ask(place: Place, existing: Existing | None, wants: Wants) -> Wants:
    """Ask for what flags have not said. Each question has the value of the proposal."""
    from dataclasses import replace

    from dtrain.initializing.proposal import propose

    def proposal() -> Proposal:
        return propose(place, existing, wants)

    def with_option(name: str, names: list[str]) -> Wants:
        now = proposal()
        known = {*wants.options, *place.site["slurm"], *(existing.options if existing else ())}
        if now.launcher != "slurm" or name in known or len(names) < 2:
            return wants
        default = now.options.get(name) or names[0]
        answer = click.prompt(name.capitalize(), type=click.Choice(names), default=default)
        return replace(wants, options={**wants.options, name: answer})

    if wants.launcher is None and len(place.launchers) > 1:
        default = proposal().launcher
        choice = click.Choice(list(dict.fromkeys([*place.launchers, default])))
        wants = replace(wants, launcher=click.prompt("Launcher", type=choice, default=default))
    wants = with_option("partition", [each.name for each in place.partitions])
    wants = with_option("account", list(place.accounts))
    if wants.nodes is None and not (existing and existing.nodes):
        answer = click.prompt("Nodes", default=proposal().nodes, value_proc=_nodes)
        wants = replace(wants, nodes=answer)
    now = proposal()
    if wants.gpus is None and now.gpus_there and not (existing and existing.gpus is not None):
        text, least = "GPUs per node (0 trains on the CPU)", click.IntRange(min=0)
        wants = replace(wants, gpus=click.prompt(text, type=least, default=now.gpus))
    now = proposal()
    if wants.procs is None and not now.gpus and not (existing and existing.procs):
        text, least = "Processes per node", click.IntRange(min=1)
        wants = replace(wants, procs=click.prompt(text, type=least, default=now.procs or 1))
    return wants


def _nodes(text: str) -> str:
    try:
        _check_nodes(text)
    except UsageError as error:
        raise click.BadParameter(str(error).removeprefix("--nodes: ")) from None
    return text


def _check(folder: Path, proposal: Proposal) -> None:
    """Plan what was written. What `dtrain launch` would refuse is an error of this command too."""
    from dtrain.job.load import flag
    from dtrain.planning import Request, plan_run

    options = {"node_rank": flag("--node-rank", 0)} if proposal.launcher == "torchrun" else {}
    request = Request(launcher=proposal.launcher, options=options)
    plan_run(str(folder / "job.yaml"), request).refuse_unlaunchable(detach=False)


def _next(folder: Path, proposal: Proposal) -> list[str]:
    """Return the commands to run next."""
    job = os.path.normpath(folder / "job.yaml")
    flags = "" if proposal.launcher == "local" else f"--launcher {proposal.launcher} "
    plan = f"  dtrain plan {flags}{job}"
    if proposal.launcher == "torchrun" and proposal.nodes != "1":
        plan = f"  dtrain plan {flags}--node-rank 0 {job}"
        flags += "--node-rank K --run-id ID "
        about = "on each host, with its K from 0 and the same ID"
    else:
        about = "starts it"
    launch = f"  dtrain launch {flags}{job}"
    width = max(len(plan), len(launch))
    return [
        "next:",
        f"{plan.ljust(width)}  # shows the launch",
        f"{launch.ljust(width)}  # {about}",
    ]
