"""`dtrain checkpoint export`: the tensors of a checkpoint in one file."""

from __future__ import annotations

import click

from dtrain.cli import options as shared


@click.command(
    "export",
    cls=shared.Command,
    examples=(
        (
            "dtrain checkpoint export --to safetensors",
            "Write the model of the newest checkpoint of the newest run.",
        ),
        (
            "dtrain checkpoint export digits-4f:best --to torch -o model.pt",
            "Write a dict for torch.load.",
        ),
    ),
)
@shared.checkpoint_argument
@shared.option(
    shared.WHAT,
    "--to",
    required=True,
    type=click.Choice(["safetensors", "torch"]),
    help="Format; torch is a dict of tensors for torch.load.",
)
@shared.option(
    shared.WHAT,
    "--all",
    "everything",
    is_flag=True,
    help="Write all tensors of the state, not only the model's.",
)
@shared.runs_option
@shared.option(
    shared.WHERE,
    "-o",
    "--output",
    metavar="FILE",
    help="File to write.  [default: RUN-STEP.SUFFIX]",
)
@shared.option(shared.WHERE, "--force", is_flag=True, help="Replace an existing file.")
@shared.json_option
def command(
    checkpoint: str,
    to: str,
    everything: bool,
    runs: str,
    output: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the tensors of CHECKPOINT into one file: RUN:STEP, RUN:best, RUN, or a directory.

    It needs neither the task's code nor a GPU, and little memory. Every byte is verified. `dtrain
    export` writes formats that also contain the computation.
    """
    from pathlib import Path

    from dtrain.checkpoints.contents import opened
    from dtrain.checkpoints.exporting import SUFFIXES, write
    from dtrain.checkpoints.lookup import find
    from dtrain.words import counted, size

    found = find(checkpoint, runs)
    with opened(found) as contents:
        tensors = contents.tensors(everything=everything)
        step = contents.progress.get("step")
        run = found.folder.name if found.directory is None else found.directory.run.id
        default = f"{run}-{step}{SUFFIXES[to]}"
        target = Path(default if output is None else output)
        written = write(tensors, to, target, {"run": run, "step": str(step)}, force=force)
    if as_json:
        about = {"path": str(target), "bytes": written, "tensors": len(tensors)}
        shared.print_json({**about, "checkpoint": found.name})
    else:
        what = f"{counted(len(tensors), 'tensor')}, {size(written)}"
        click.echo(f"wrote {target} from {found.name}: {what}")
