"""One checkpoint on disk. It is written completely or not at all, and every byte is verified.

Each rank writes its part into a temporary directory. When all have, one rank writes the manifest,
which lists all files with their digests, and gives the directory its name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import CheckpointError
from dtrain.run import manifest
from dtrain.run.files import fsync_dir, write_atomic
from dtrain.run.manifest import NAME as MANIFEST
from dtrain.run.manifest import Entry
from dtrain.train.checkpoint.blocks import BlockFile, Cache, write_file

STATE, PROGRESS, TENSORS = "state.json", "progress.json", ".safetensors"
_ASIDE, _OLD = ".aside-", "-old"


def part_name(rank: int) -> str:
    return f"rank-{rank:05d}{TENSORS}"


def aside(final: Path, save: str) -> Path:
    """Return the temporary directory of a checkpoint. `save` is the name of the save."""
    return final.with_name(f".{final.name}{_ASIDE}{save}")


def is_aside(name: str) -> bool:
    """Return whether it is the name of a temporary directory of a checkpoint."""
    return name.startswith(".") and _ASIDE in name


def new_save() -> str:
    return secrets.token_hex(4)


def commit(
    final: Path,
    save: str,
    parts: Mapping[str, Entry],
    texts: Mapping[str, str],
    about: Mapping[str, Any],
) -> None:
    """Write the texts and the manifest, and give the checkpoint its name.

    Every rank has written its part.

    Args:
        final: the directory of the checkpoint. An existing one is replaced.
        save: the name of the save.
        parts: the files of all ranks.
        texts: the other files, by name.
        about: plain JSON for people: versions, world size, time.

    Raises:
        OSError: the file system reported an error.
    """
    folder = aside(final, save)
    entries = dict(parts)
    for name, text in texts.items():
        entries[name] = write_file(folder / name, [text.encode()])
    write_atomic(folder / MANIFEST, manifest.text_of(save, about, entries))
    _put_in_place(folder, final)


class OpenCheckpoint:
    """The files of a checkpoint, open to be read and verified. It is a context manager.

    Raises:
        CheckpointError: the manifest or a file is missing or damaged. The message describes the
            damage, without the path.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = manifest.read(folder)
        self.files: dict[str, BlockFile] = {}
        cache = Cache()
        try:
            for name, entry in sorted(self.manifest.files.items()):
                self.files[name] = BlockFile(folder / name, entry, cache)
        except CheckpointError:
            self.close()
            raise

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def parts(self) -> list[BlockFile]:
        """Return the files of tensors."""
        return [file for name, file in self.files.items() if name.endswith(TENSORS)]

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file."""
        if name not in self.files:
            raise CheckpointError(f"{name} is missing", code="checkpoint.missing-file")
        try:
            # unlike `files.parse_as`: surrogates stay as they are, and trees may be deep
            found = json.loads(self.files[name].read_all())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{name} is damaged: {error!s:.300}", code="checkpoint.damaged-file"
            ) from None
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{name} is damaged: it is no object", code="checkpoint.damaged-file"
            )
        return found

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Verify all files. The ranks share the work.

        Raises:
            CheckpointError: a file is damaged or cannot be read.
        """
        for index, file in enumerate(self.files.values()):
            if index % world_size == rank:
                file.verify()


def copy_checkpoint(folder: Path, final: Path) -> None:
    """Copy a checkpoint to another name. The copy remains when the original is removed.

    The files are linked if possible, because they never change.

    Raises:
        OSError: the file system reported an error; an older checkpoint of that name is intact.
    """
    temporary = aside(final, new_save())
    try:
        shutil.copytree(folder, temporary, copy_function=_link)
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copy2(source, target)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; an incomplete one is never visible under its name."""
    temporary = aside(folder, new_save())
    try:
        os.rename(folder, temporary)
    except FileNotFoundError:
        return
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete temporary directories of killed writers; restore checkpoints that they had moved."""
    for path in unfinished(checkpoints):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.glob(f".*{_ASIDE}*{_OLD}"):
        os.rename(path, _final(path))


def unfinished(checkpoints: Path) -> list[Path]:
    """Return temporary directories of writers, without checkpoints that they had moved."""
    found = checkpoints.glob(f".*{_ASIDE}*")
    return [path for path in found if not path.name.endswith(_OLD) or _final(path).exists()]


def _final(temporary: Path) -> Path:
    return temporary.with_name(temporary.name[1:].partition(_ASIDE)[0])


def _put_in_place(folder: Path, final: Path) -> None:
    fsync_dir(folder)
    if final.exists():
        # between these two lines no checkpoint has that name; `remove_leftovers` restores the old
        os.rename(final, old := final.with_name(folder.name + _OLD))
        os.rename(folder, final)
        fsync_dir(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(folder, final)
        fsync_dir(final.parent)
