"""One checkpoint on disk. It is written completely or not at all, and every byte is verified.

The common formats do not notice a flipped byte: torch.save files, safetensors and DCP shards load
it without an error. So a manifest holds the size and the xxh3-128 of every file. Both are computed
from the bytes that were written, not from what the disk returned.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from dtrain.errors import CheckpointError, DamagedError
from dtrain.plainjson import to_json
from dtrain.run import files, manifest
from dtrain.run.files import fsync_dir, write_atomic
from dtrain.run.manifest import NAME as MANIFEST
from dtrain.run.manifest import Manifest
from dtrain.train.checkpoint import leaves

_FORMAT = 1
_PROGRESS = "progress.json"
_CHUNK = 1 << 22
_ASIDE, _OLD = ".aside-", "-old"


def write_checkpoint(
    final: Path, tensors: dict[str, Any], progress: dict[str, Any], about: dict[str, Any]
) -> int:
    """Write a checkpoint directory; it appears under its name completely or not at all.

    Args:
        final: the directory of the checkpoint. An existing one is replaced.
        tensors: the values of the files, by file stem. `torch.save` writes them, and
            `weights_only` must be able to read them.
        progress: plain JSON.
        about: plain JSON for people: versions, world size, time.

    Returns:
        The number of bytes written.

    Raises:
        OSError: the file system reported an error; no files remain.
    """
    aside = _aside(final)
    aside.mkdir(parents=True)
    try:
        written = {}
        for stem, value in tensors.items():
            written[f"{stem}.pt"] = _write_tensors(aside / f"{stem}.pt", value)
        written[_PROGRESS] = _write_text(aside / _PROGRESS, to_json(progress, indent=2) + "\n")
        listed = {"format": _FORMAT, "about": about, "files": written}
        listed["digest"] = _manifest_digest(listed)
        write_atomic(aside / MANIFEST, json.dumps(listed, indent=2) + "\n")  # last, fsynced
        _put_in_place(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return sum(entry["bytes"] for entry in written.values())


def _verify(folder: Path, listed: Manifest) -> None:
    for name, entry in listed.files.items():
        path = folder / name
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise CheckpointError(
                    f"{name} is not a regular file", code="checkpoint.damaged-file"
                )
            if about.st_size != entry.bytes:
                raise CheckpointError(
                    f"{name} has {about.st_size} bytes instead of {entry.bytes}",
                    code="checkpoint.damaged-file",
                )
            if _digest_file(path) != entry.xxh3_128:
                raise CheckpointError(
                    f"{name} is damaged: its xxh3 differs from the manifest",
                    code="checkpoint.damaged-file",
                )
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing", code="checkpoint.missing-file") from None
        except OSError as error:
            raise CheckpointError(
                f"{name} cannot be read: {error.strerror}", code="checkpoint.unreadable-file"
            ) from error


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify and read a checkpoint.

    Returns:
        The tensors by file stem, on the CPU, and the progress.

    Raises:
        CheckpointError: it is damaged. The message describes the damage, without the path.
    """
    listed = _read_manifest(folder)
    _verify(folder, listed)
    tensors = {}
    for path in (folder / name for name in sorted(listed.files) if name.endswith(".pt")):
        try:
            tensors[path.stem] = leaves.read(path)
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            raise CheckpointError(
                f"{path.name} cannot be read: {''.join(first)}", code="checkpoint.damaged-file"
            ) from error
    if _PROGRESS not in listed.files:
        raise CheckpointError(f"{_PROGRESS} is missing", code="checkpoint.missing-file")
    with _as_checkpoint_error(_PROGRESS, code="checkpoint.damaged-file"):
        progress = files.read_as(dict[str, Any], folder / _PROGRESS)
    return tensors, progress or {}


def copy_checkpoint(folder: Path, final: Path) -> None:
    """Copy a checkpoint to another name. The copy remains when the original is removed.

    The files are linked if possible, because they never change.

    Raises:
        OSError: the file system reported an error; an older checkpoint of that name is intact.
    """
    aside = _aside(final)
    try:
        shutil.copytree(folder, aside, copy_function=_link)
        _put_in_place(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copy2(source, target)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; an incomplete one is never visible under its name."""
    aside = _aside(folder)
    try:
        os.rename(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete temporary directories of killed writers; restore checkpoints that they had moved."""
    for path in checkpoints.glob(f".*{_ASIDE}*"):
        final = checkpoints / path.name[1:].partition(_ASIDE)[0]
        if path.name.endswith(_OLD) and not final.exists():
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}{_ASIDE}{secrets.token_hex(4)}")


class _HashingFile:
    """A binary file that hashes what is written to it.

    `check` raises the error of a failed write; later writes are dropped. The error cannot be
    raised at once: torch's writer ends the process when the file raises while it closes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._failure: OSError | None = None
        self.size = 0
        self.digest = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        if self._failure is None:
            try:
                self._write_all(view)
            except OSError as error:
                self._failure = error
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:  # one write(2) takes at most 2 GiB
            view = view[self._file.write(view) :]

    def flush(self) -> None:
        """Do nothing: `check` flushes once, before the fsync."""

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._file.flush()
        os.fsync(self._file.fileno())


def _write_tensors(path: Path, value: Any) -> dict[str, Any]:
    with open(path, "wb", buffering=0) as raw:
        file = _HashingFile(raw)
        torch.save(value, file)
        file.check()
    return {"bytes": file.size, "xxh3_128": file.digest.hexdigest()}


def _write_text(path: Path, text: str) -> dict[str, Any]:
    write_atomic(path, text)
    data = text.encode()
    return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def _put_in_place(aside: Path, final: Path) -> None:
    fsync_dir(aside)
    if final.exists():
        # between these two lines no checkpoint has that name; `remove_leftovers` restores the old
        os.rename(final, old := final.with_name(aside.name + _OLD))
        os.rename(aside, final)
        fsync_dir(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(aside, final)
        fsync_dir(final.parent)


def _read_manifest(folder: Path) -> Manifest:
    with _as_checkpoint_error(MANIFEST, code="checkpoint.damaged-manifest"):
        listed = files.read_as(dict[str, Any], folder / MANIFEST)
    if listed is None:
        raise CheckpointError(f"{MANIFEST} is missing", code="checkpoint.missing-manifest")
    if listed.get("digest") != _manifest_digest(listed):
        raise CheckpointError(
            f"{MANIFEST} is damaged: its own digest does not match",
            code="checkpoint.damaged-manifest",
        )
    found = manifest.parse(json.dumps(listed))
    if found.format != _FORMAT:
        raise CheckpointError(
            f"its format is {found.format}; this version of dtrain reads format {_FORMAT}",
            code="checkpoint.other-format",
        )
    return found


@contextlib.contextmanager
def _as_checkpoint_error(name: str, *, code: str) -> Iterator[None]:
    """Raise `CheckpointError` for a file that is unreadable or damaged: older ones can be used."""
    try:
        yield
    except DamagedError as error:
        raise CheckpointError(f"{name} is damaged: {error.why}", code=code) from None
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be read: {error.strerror}", code="checkpoint.unreadable-file"
        ) from error


def _manifest_digest(listed: dict[str, Any]) -> str:
    plain = {key: value for key, value in listed.items() if key != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def _digest_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
