"""The content of a checkpoint: what each rank contributes, and the state that is read from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import CheckpointError
from dtrain.plainjson import to_json
from dtrain.train.checkpoint import parts, tree
from dtrain.train.checkpoint.files import PROGRESS, STATE, OpenCheckpoint
from dtrain.train.checkpoint.headers import read_headers

_IN_PLACE = ("model", "optimizer")
"""The parts of the state whose tensors are read when they are loaded, straight to their place."""


@dataclass(frozen=True)
class Contribution:
    """What one rank writes."""

    image: parts.Image
    structure: int
    """A number that must be the same on all ranks."""
    texts: dict[str, str]
    """The files of rank 0 without tensors, by name."""


def contribution(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    progress: Mapping[str, Any],
    rank: int,
    world_size: int,
) -> Contribution:
    """Return what a rank writes.

    Args:
        state: trees by name, the same on all ranks, with tensors that are replicas or sharded.
        own: more trees by name. Those of rank 0 are written, by rank 0.
        progress: plain JSON.
        rank: this rank.
        world_size: the number of ranks.
    """
    shared = tree.split(dict(state))
    pieces = parts.share(shared.tensors, rank, world_size)
    texts = {}
    if rank == 0:
        more = tree.split(dict(own))
        pieces += [
            parts.Piece(key, tuple(each.shape), (0,) * each.ndim, each)
            for key, each in more.tensors.items()
        ]
        texts[STATE] = json.dumps({**shared.described, **more.described}) + "\n"
        texts[PROGRESS] = to_json(dict(progress), indent=2) + "\n"
    return Contribution(parts.Image(pieces), shared.structure, texts)


def read(opened: OpenCheckpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the progress of a checkpoint.

    In `model` and `optimizer` of the state, each tensor is a `StoredTensor`; elsewhere they are
    read, on the CPU.

    Raises:
        CheckpointError: it is damaged.
    """
    found, described = _stored(opened), opened.json(STATE)
    state: dict[str, Any] = {}
    with _damaged_state():
        for name, each in described.items():
            in_place = name in _IN_PLACE
            state[name] = tree.join(each, found.__getitem__ if in_place else _reader(found))
    return state, opened.json(PROGRESS)


def read_model(opened: OpenCheckpoint) -> dict[str, parts.StoredTensor]:
    """Return the tensors of the model in a checkpoint by name. No other state is read.

    Raises:
        CheckpointError: it is damaged, or has no model.
    """
    found, described = _stored(opened), opened.json(STATE).get("model")
    with _damaged_state():
        model = tree.join(described, found.__getitem__)
        return {name: each for name, each in model.items() if isinstance(each, parts.StoredTensor)}


def _stored(opened: OpenCheckpoint) -> dict[str, parts.StoredTensor]:
    stored = read_headers(opened.parts())
    return {key: parts.StoredTensor(each) for key, each in stored.items()}


@contextlib.contextmanager
def _damaged_state() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch raises errors of any type for bytes that are not its own
        raise CheckpointError(
            f"{STATE} is damaged: {error!r:.300}", code="checkpoint.damaged-file"
        ) from error


def _reader(found: Mapping[str, parts.StoredTensor]) -> Any:
    return lambda key: found[key].read()


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify a checkpoint, and return its whole state and its progress.

    Raises:
        CheckpointError: it is damaged. The message describes the damage, without the path.
    """
    with OpenCheckpoint(folder) as opened:
        opened.verify()
        state, progress = read(opened)
        return parts.whole(state), progress
