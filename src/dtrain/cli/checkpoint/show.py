"""`dtrain checkpoint show`: what a checkpoint contains."""

from __future__ import annotations

import math
from typing import Any

import click

from dtrain.cli import options as shared
from dtrain.console import out


@click.command(
    "show",
    cls=shared.Command,
    examples=(
        ("dtrain checkpoint show", "The newest checkpoint of the newest run."),
        ("dtrain checkpoint show digits-4f:200 --tensors", "All tensors of another one."),
    ),
)
@shared.checkpoint_argument
@shared.runs_option
@shared.option(shared.WHAT, "--tensors", is_flag=True, help="Also show every tensor.")
@shared.json_option
def command(checkpoint: str, runs: str, tensors: bool, as_json: bool) -> None:
    """Show what CHECKPOINT contains: RUN:STEP, RUN:best, RUN (its newest), or a directory."""
    from dtrain.checkpoints.contents import opened
    from dtrain.checkpoints.lookup import find

    found = find(checkpoint, runs)
    with opened(found) as contents:
        facts = {
            "name": found.name,
            "path": str(found.folder),
            **{key: contents.progress.get(key) for key in ("step", "epoch", "consumed")},
            **contents.manifest.about,
            "bytes": contents.manifest.bytes,
            "files": {name: each.bytes for name, each in contents.manifest.files.items()},
            "trees": _trees(contents.stored.values()),
        }
        if tensors:
            facts["tensors"] = [_tensor(each) for each in contents.stored.values()]
    if as_json:
        shared.print_json(facts)
    else:
        click.echo("\n".join(_lines(facts)))


def _trees(stored: Any) -> dict[str, dict[str, int]]:
    trees: dict[str, dict[str, int]] = {}
    for each in stored:
        tree = trees.setdefault(each.key.partition("/")[0], {"tensors": 0, "bytes": 0})
        tree["tensors"] += 1
        tree["bytes"] += each.bytes
    return trees


def _tensor(stored: Any) -> dict[str, Any]:
    return {
        "name": stored.key,
        "dtype": stored.dtype,
        "shape": list(stored.shape),
        "elements": math.prod(stored.shape),
        "bytes": stored.bytes,
        "parts": len(stored.chunks),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    from dtrain.cli.checkpoint import table
    from dtrain.words import size

    width = out.width()
    lines = [f"{name:<12}{text}" for name, text in _texts(facts).items() if text]
    files = [(name, size(number)) for name, number in facts["files"].items()]
    lines += ["", *table.lines(("FILE", "SIZE"), files, width)]
    trees = [
        (name, str(each["tensors"]), size(each["bytes"])) for name, each in facts["trees"].items()
    ]
    lines += ["", *table.lines(("STATE", "TENSORS", "SIZE"), trees, width)]
    if "tensors" in facts:
        rows = [
            (
                each["name"],
                each["dtype"],
                str(each["shape"]),
                size(each["bytes"]),
                str(each["parts"]),
            )
            for each in facts["tensors"]
        ]
        heads = ("TENSOR", "TYPE", "SHAPE", "SIZE", "PARTS")
        lines += ["", *table.lines(heads, rows, width, left=3)]
    return lines


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    """Return the facts in words, by heading."""
    import time

    from dtrain.run.files import duration, local_time
    from dtrain.words import counted, size

    saved, ranks = facts.get("time"), facts.get("world_size")
    used = facts["consumed"]
    text = {
        "checkpoint": facts["name"],
        "path": facts["path"],
        "step": str(facts["step"]),
        "epoch": "" if facts["epoch"] is None else str(facts["epoch"]),
        "position": "" if used is None else f"{counted(used, 'sample')} of this epoch used",
        "torch": str(facts.get("torch", "")),
        "strategy": str(facts.get("strategy", "")),
        "ranks": "" if ranks is None else str(ranks),
        "size": size(facts["bytes"]),
    }
    if isinstance(saved, int | float):
        text["saved"] = f"{local_time(saved)}, {duration(time.time() - saved)} ago"
    return text
