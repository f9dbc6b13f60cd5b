"""Checkpoints of one process, for tests that look at files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.blocks import write_file
from dtrain.train.checkpoint.content import contribution
from dtrain.train.checkpoint.files import aside, commit, new_save, part_name
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.store import CheckpointStore

TENSORS = part_name(0)
"""The name of the file of tensors."""


def write_checkpoint(
    final: Path, state: dict[str, Any], progress: dict[str, Any], about: dict[str, Any]
) -> None:
    """Write a checkpoint as one rank does it; the tree `extras` of the state is its own."""
    own = {name: tree for name, tree in state.items() if name == "extras"}
    shared = {name: tree for name, tree in state.items() if name != "extras"}
    content = contribution(shared, own, progress, 0, 1)
    save = new_save()
    folder = aside(final, save)
    folder.mkdir(parents=True)
    entry = write_file(folder / TENSORS, content.image.buffers())
    commit(final, save, {TENSORS: entry}, content.texts, about)


def store(run: RunDir, keep: int = 5) -> CheckpointStore:
    return CheckpointStore(run, RankInfo(), Retention(keep))


def save(checkpoints: CheckpointStore, step: int, model: Any) -> Path:
    """Save a model, which is a tree, as the checkpoint of a step."""
    content = contribution({"model": model}, {}, {"step": step}, 0, 1)
    saved = checkpoints.save(step, content, {})
    assert saved is not None
    return saved.folder
