"""The state in a checkpoint by name, without torch: its tensors as bytes, its values as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dtrain.checkpoints.lookup import Found
from dtrain.errors import CheckpointError
from dtrain.run.manifest import Manifest
from dtrain.train.checkpoint.files import PROGRESS, STATE, OpenCheckpoint
from dtrain.train.checkpoint.headers import StoredBytes, read_headers

MODEL = "model"
_TENSOR = "$tensor"


@dataclass(frozen=True)
class Contents:
    """An open checkpoint."""

    manifest: Manifest
    progress: dict[str, Any]
    stored: dict[str, StoredBytes]
    """Every tensor by its key. Two names may have one key, for example of tied weights."""
    state: dict[str, Any]
    """The trees of state by name, in which tensors are named by key."""

    def tensors(self, *, everything: bool) -> dict[str, StoredBytes]:
        """Return the model's tensors by plain name; or all, with the names of their trees."""
        pairs = self._leaves(everything=everything)
        keys = {name: leaf[_TENSOR] for name, leaf in pairs if _is_tensor(leaf)}
        missing = [name for name, key in keys.items() if key not in self.stored]
        if missing:
            raise CheckpointError(
                f"{STATE} is damaged: {missing[0][:200]} is in no file",
                code="checkpoint.damaged-file",
            )
        return {name: self.stored[key] for name, key in keys.items()}

    def values(self, *, everything: bool) -> dict[str, Any]:
        """Return all state that is not a tensor, by name."""
        pairs = self._leaves(everything=everything)
        return {name: leaf for name, leaf in pairs if not _is_tensor(leaf)}

    def _leaves(self, *, everything: bool) -> Iterator[tuple[str, Any]]:
        if everything:
            return _leaves(self.state, "")
        return _leaves(self.state.get(MODEL, {}), "")


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, dict) and isinstance(leaf.get(_TENSOR), str)


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their paths, for example `optimizer/groups/0/lr`."""
    kind = next(iter(tree), "") if isinstance(tree, dict) else ""
    if kind in ("$tuple", "$dict", "$ordered") and isinstance(tree[kind], list):
        tree = tree[kind]
        if kind != "$tuple":
            tree = {_key(pair): pair[-1] for pair in tree if isinstance(pair, list) and pair}
    elif kind.startswith("$"):
        yield name, tree
        return
    if isinstance(tree, dict):
        pairs = list(tree.items())
    elif isinstance(tree, list):
        pairs = [(str(index), each) for index, each in enumerate(tree)]
    else:
        yield name, tree
        return
    for key, each in pairs:
        yield from _leaves(each, f"{name}/{key}" if name else key)


def _key(pair: list[Any]) -> str:
    key = pair[0]
    return "/".join(str(leaf) for _, leaf in _leaves(key, "")) or str(key)


@contextmanager
def opened(found: Found) -> Iterator[Contents]:
    """Open a checkpoint, after a download if it is at a URL.

    Raises:
        CheckpointError: it is damaged. The error names the checkpoint.
    """
    folder = found.fetch()
    try:
        with OpenCheckpoint(folder) as files:
            stored = read_headers(files.parts())
            yield Contents(files.manifest, files.json(PROGRESS), stored, files.json(STATE))
    except CheckpointError as error:
        raise found.named(error) from None
    except RecursionError:
        error_ = CheckpointError(f"{STATE} is nested too deeply", code="checkpoint.damaged-file")
        raise found.named(error_) from None
