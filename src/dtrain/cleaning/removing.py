"""Remove what `finding` has found, unless it has changed since."""

from __future__ import annotations

import os
import secrets
import shutil
from itertools import groupby
from pathlib import Path

from dtrain.checkpoints.lookup import of_run
from dtrain.checkpoints.pruning import prune
from dtrain.cleaning.claim import held
from dtrain.cleaning.finding import Found, Item, reason_to_keep
from dtrain.cleaning.leftovers import REMOVED, leftovers, remove, removed_runs
from dtrain.errors import DtrainError
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir, list_runs

_CHANGED = "it has changed since the list was made; nothing of it was removed"


def remove_all(found: Found, root: Path) -> tuple[list[Item], dict[str, str]]:
    """Remove everything that was found.

    Each run is held meanwhile, so that no command resumes it.

    Returns:
        What was removed, and by the id of a run why it, or a part of it, was not.
    """
    removed: list[Item] = []
    problems: dict[str, str] = {}
    runs = {run.id: run for run in list_runs(root)}
    for name, group in groupby(found.items, key=lambda item: item.run):
        items = list(group)
        try:
            if not name:
                _remove_rests(items, root)
            elif name not in runs:
                continue  # somebody else has removed it
            else:
                _remove_of(runs[name], items, found.attempts[name])
            removed += items
        except (DtrainError, OSError) as error:
            problems[name] = str(error)
    return removed, problems


def _remove_rests(items: list[Item], root: Path) -> None:
    names = {item.name for item in items}
    for path in removed_runs(root):
        if path.name in names:
            shutil.rmtree(path)


def _remove_of(run: RunDir, items: list[Item], attempt: int) -> None:
    with held(run) as before:
        if before is not None and before.attempt != attempt:
            raise DtrainError(_CHANGED, code="run.changed-meanwhile")
        if items[0].kind == "run":
            _remove_run(run)
        else:
            _remove_parts(run, items)


def _remove_run(run: RunDir) -> None:
    reason = reason_to_keep(run)
    if reason is not None:
        raise DtrainError(reason, code="run.changed-meanwhile")
    url = run.url
    if url is not None:
        store = RemoteStore(url)
        store.remove(run.resolved.name)  # first: from now on it is no run
        store.remove(*store.files())
    # at once under its name, so that nobody finds a part of it
    target = run.path.with_name(f"{REMOVED}{run.id}-{secrets.token_hex(4)}")
    os.rename(run.path, target)
    shutil.rmtree(target)


def _remove_parts(run: RunDir, items: list[Item]) -> None:
    checkpoints = {Path(item.name).name for item in items if item.kind == "checkpoint"}
    if checkpoints:
        if checkpoints != {*prune(run, dry_run=True, is_held=True).removed}:
            raise DtrainError(_CHANGED, code="run.changed-meanwhile")
        of_run(run).remove(checkpoints)
    names = {item.name for item in items if item.kind == "leftover"}
    if not names:
        return
    remote = RemoteCheckpoints.of(run, patient=False)
    if remote is not None:
        remote.remove_leftovers()
        return
    for path, _ in list(leftovers(run)):
        if str(path.relative_to(run.path)) in names:
            remove(path)
