"""Files that an ended run no longer needs. Nothing outside of its directory is one of them."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.files import unfinished

_TEMPORARY = re.compile(r"\..+\.(\d+\.[0-9a-f]{8}|[0-9a-f]{16})")
"""Names of `run.files.write_atomic` and `create_exclusive`."""
_OLD_S = 3600.0
_TREE = re.compile(r"(?:tree|job)-(\d+)(?:\.tar)?")
REMOVED = ".removed-"
"""The beginning of the name of a run that is being removed."""


def leftovers(run: RunDir) -> Iterator[tuple[Path, str]]:
    """Yield the leftovers in the directory of a run that has ended, each with a description."""
    for name in ("checkpoints", "code"):
        if (run.path / name).is_symlink():
            return  # what is there may be of others too
    for path in unfinished(run.checkpoints):
        yield path, "a checkpoint that was not finished"
    parts = run.predictions_part(0).parent
    if parts.is_dir() and not parts.is_symlink():
        yield parts, "parts of predictions"
    for path in run.path.glob(".env-*.json"):
        yield path, "values of secret variables"
    trees = {path: int(found[1]) for path in run.code.glob("*") if (found := _tree(path))}
    newest = max(trees.values(), default=0)
    for path, attempt in sorted(trees.items()):
        if attempt < newest:
            yield path, "the code of an earlier attempt"
    yield from ((path, "a temporary file") for path in _temporary_files(run))


def removed_runs(root: Path) -> Iterator[Path]:
    """Yield the rest of runs whose removal did not end."""
    for path in root.glob(f"{REMOVED}*"):
        if path.is_dir() and not path.is_symlink():
            yield path


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory. A file with two links counts
    once."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    sizes: dict[int, int] = {}
    for here, _, names in os.walk(path):
        for name in names:
            stat = os.lstat(os.path.join(here, name))
            sizes[stat.st_ino] = stat.st_size
    return sum(sizes.values())


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory. Links in it are removed, and not what they name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tree(path: Path) -> re.Match[str] | None:
    return _TREE.fullmatch(path.name)


def _temporary_files(run: RunDir) -> Iterator[Path]:
    """Yield files that were not renamed, because their writer was killed."""
    for here, folders, names in os.walk(run.path):
        if here == str(run.path):
            folders[:] = [name for name in folders if name not in ("checkpoints", "code")]
        for name in names:
            path = Path(here, name)
            is_old = time.time() - path.lstat().st_mtime > _OLD_S
            if _TEMPORARY.fullmatch(name) and is_old and not path.is_symlink():
                yield path
