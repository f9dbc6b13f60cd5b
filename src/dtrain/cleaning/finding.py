"""What would go, and what stays although it was asked for."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dtrain.checkpoints.lookup import of_run
from dtrain.checkpoints.pruning import prune
from dtrain.cleaning.leftovers import leftovers, removed_runs, size_of
from dtrain.errors import CheckpointError, DtrainError
from dtrain.run.attempts import DAMAGED
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.remote.store import RemoteStore, is_url
from dtrain.run.rundir import RunDir
from dtrain.searching.index import Entry
from dtrain.train.checkpoint.directory import is_step
from dtrain.words import numbered


@dataclass(frozen=True)
class Item:
    """Something that would go."""

    kind: Literal["run", "checkpoint", "leftover"]
    run: str
    """The id of its run. Empty for the rest of a run whose removal did not end."""
    name: str
    """Its path in the directory of the run. Empty for a whole run."""
    bytes: int
    why: str


@dataclass
class Found:
    """What would go, and what stays."""

    items: list[Item] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    """The newest attempt of each run, by id."""
    stays: dict[str, str] = field(default_factory=dict)
    """By the id of a run: why it stays, or parts of it stay."""


def find(
    entries: Sequence[Entry], root: Path, *, failed: bool = False, older_than: float | None = None
) -> Found:
    """Find what would go: leftovers and checkpoints that runs do not keep.

    Args:
        entries: all runs.
        root: their directory on this host.
        failed: whether whole runs that have failed go too.
        older_than: the age in seconds from which on whole runs go too, counted from their end. With
            both, only failed runs of that age go.
    """
    found = Found()
    users = _users(entries)
    for path in removed_runs(root):
        why = "a run whose removal did not end"
        found.items.append(Item("leftover", "", path.name, size_of(path), why))
    for entry in entries:
        run_id = entry.run.id
        try:
            goes = (failed or older_than is not None) and _goes(entry, failed, older_than)
            reason = _untouchable(entry)
            if reason is not None:
                if goes or entry.row["state"] == DAMAGED:
                    found.stays[run_id] = reason
                continue
            found.attempts[run_id] = entry.row["attempt"]
            if goes:
                reason = _needed(users[run_id]) or reason_to_keep(entry.run)
                if reason is None:
                    found.items.append(_whole(entry, users[run_id]))
                    continue
                found.stays[run_id] = reason
            if entry.row["state"] != "prepared":
                found.items += _parts(entry, found, users[run_id])
        except (DtrainError, OSError) as error:
            found.stays[run_id] = str(error)
    return found


def _goes(entry: Entry, failed: bool, older_than: float | None) -> bool:
    row = entry.row
    if failed and row["state"] != "failed":
        return False
    started = row.get("started") or entry.run.resolved.stat().st_mtime
    ended = row.get("ended") or started + (row.get("duration") or 0.0)
    return older_than is None or time.time() - ended > older_than


def _untouchable(entry: Entry) -> str | None:
    """Return why nothing of a run can go. None if it can."""
    if entry.row["state"] == DAMAGED:
        return f"it is damaged, and may be running: {entry.row['reason']}"
    if entry.row["state"] == "running":
        return "it is running"
    return "it is a link to another directory" if entry.run.path.is_symlink() else None


def _needed(users: Sequence[Entry]) -> str | None:
    names = [user.run.id for user in users if user.row["state"] in ("running", "prepared")]
    return f"{numbered('run', names)} may still read its weights" if names else None


def reason_to_keep(run: RunDir) -> str | None:
    """Return why a whole run must not go: a checkpoint is pinned."""
    names = [name for name, marks in of_run(run).marks().items() if marks.pinned]
    return f"pinned: {numbered('checkpoint', sorted(names))}" if names else None


def _users(entries: Sequence[Entry]) -> Mapping[str, list[Entry]]:
    """Return, by the id of a run, the other runs that began with weights of it."""
    places = {str(entry.run.url or os.path.realpath(entry.run.path)): entry for entry in entries}
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        source = entry.job.get("checkpoint.init_from")
        if not isinstance(source, str):
            continue
        path = Path(source if is_url(source) else os.path.realpath(source))
        text = source if is_url(source) else str(path)
        of = next((places[text[:k]] for k in _ends(text) if text[:k] in places), None)
        if of is not None and of is not entry:
            found[of.run.id].append(entry)
    return found


def _ends(path: str) -> list[int]:
    """Return where a path, and each directory above it, ends."""
    return [*(k for k, letter in enumerate(path) if letter == "/"), len(path)]


def _whole(entry: Entry, users: Sequence[Entry]) -> Item:
    run, row = entry.run, entry.row
    url = run.url
    if url is None:
        size = size_of(run.path)
    else:
        size = sum(int(info.get("size") or 0) for info in RemoteStore(url).files().values())
    why = f"{row['state']}, step {row.get('step') or 0}{_began(users)}"
    return Item("run", run.id, "", size, why)


def _began(users: Sequence[Entry]) -> str:
    names = [user.run.id for user in users]
    return f"; {numbered('run', names)} began with its weights" if names else ""


def _parts(entry: Entry, found: Found, users: Sequence[Entry]) -> list[Item]:
    """Return the leftovers of a run, and the checkpoints that it does not keep."""
    run = entry.run
    items = []
    remote = RemoteCheckpoints.of(run, patient=False)
    if remote is None:
        for path, why in leftovers(run):
            name = str(path.relative_to(run.path))
            items.append(Item("leftover", run.id, name, size_of(path), why))
        steps = [path for path in run.checkpoints.glob("*") if is_step(path.name)]
        if run.checkpoints.is_symlink():
            found.stays[run.id] = "its checkpoints are a link to another directory"
            return items
    else:
        for name, size in remote.leftovers().items():
            why = "a checkpoint that was not finished"
            items.append(Item("leftover", run.id, f"checkpoints/{name}", size, why))
        steps = remote.folders()
    keep = entry.job.get("checkpoint.keep")
    if entry.job.get("task") and isinstance(keep, int) and len(steps) > keep:
        try:
            removed = prune(run, dry_run=True).removed
        except CheckpointError as error:
            found.stays[run.id] = str(error)
            return items
        why = f"the run keeps {keep} checkpoints{_began(users)}"
        items += [
            Item("checkpoint", run.id, f"checkpoints/{n}", b, why) for n, b in removed.items()
        ]
    return items
