"""The checkpoints of a run at a URL.

A checkpoint consists of `step-00000012/manifest.json` and the files that it lists. These are in a
directory next to it, which has the random name of the save. Every rank uploads the file that it has
written. The manifest is written last, in one request. It makes the checkpoint exist, and replaces
another of the same name as a whole.
"""

from __future__ import annotations

import fcntl
import logging
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dtrain.errors import CheckpointError
from dtrain.run import manifest
from dtrain.run.files import write_atomic
from dtrain.run.manifest import NAME as MANIFEST
from dtrain.run.manifest import Manifest
from dtrain.run.remote.store import RemoteStore, RemoteStoreError
from dtrain.run.rundir import RunDir

logger = logging.getLogger(__name__)

_REJECTED = "manifest.rejected.json"
_STEP = re.compile(r"step-\d{8,}")


class RemoteCheckpoints:
    """The checkpoints of a run at its URL. Directories of this host hold copies."""

    def __init__(self, run: RunDir, url: str, *, patient: bool = True) -> None:
        self._run = run
        self._store = RemoteStore(f"{url}/checkpoints", patient=patient)

    @classmethod
    def of(cls, run: RunDir, *, patient: bool = True) -> RemoteCheckpoints | None:
        """Return the checkpoints of a run at its URL. None when it is kept only in a directory."""
        url = run.url
        return None if url is None else cls(run, url, patient=patient)

    def folders(self) -> list[Path]:
        """Return the directories of this host for the checkpoints of steps, in no order."""
        names = [name.split("/")[0] for name in self._store.matching(f"step-*/{MANIFEST}")]
        return [self._run.checkpoints / name for name in names if _STEP.fullmatch(name)]

    def exists(self, name: str) -> bool:
        return bool(self._store.matching(f"{name}/{MANIFEST}"))

    def manifests(self) -> dict[str, bytes | None]:
        """Return the text of each manifest by the checkpoint's name; None for one without.

        The name of a rejected one ends in `.rejected`.
        """
        found = self._store.files()
        texts: dict[str, bytes | None] = {}
        for name in sorted({each.split("/")[0] for each in found}):
            if f"{name}/{MANIFEST}" not in found and f"{name}/{_REJECTED}" in found:
                texts[f"{name}.rejected"] = self._store.read(f"{name}/{_REJECTED}")
            else:
                texts[name] = self._store.read(f"{name}/{MANIFEST}")
        return texts

    def small_file(self, name: str, listed: Manifest, file: str) -> bytes | None:
        """Return the bytes of a small file of a checkpoint. None without it."""
        return self._store.read(f"{name}/{listed.save}/{file}")

    def size(self, name: str) -> int:
        """Return the bytes of all files of a checkpoint."""
        return sum(int(info.get("size") or 0) for info in self._store.files(name).values())

    def upload(self, file: Path, name: str, save: str) -> None:
        """Copy a file of a checkpoint to the URL. It is not part of the checkpoint yet.

        Args:
            file: a file of this host.
            name: the name of the checkpoint.
            save: the name of the save.
        """
        self._store.put(file, f"{name}/{save}/{file.name}")

    def commit(self, folder: Path) -> None:
        """Upload the manifest of a checkpoint, whose files are uploaded. Now it exists there."""
        text = (folder / MANIFEST).read_bytes()
        listed = manifest.parse(text)
        inside = f"{folder.name}/{listed.save}"
        uploaded = self._store.files(folder.name)
        for name, entry in listed.files.items():
            info: Any = uploaded.get(f"{inside}/{name}", {})
            if info.get("size") != entry.bytes:
                raise RemoteStoreError(
                    f"{self._store.url}/{inside}/{name} has {info.get('size', 'no')} bytes "
                    f"instead of {entry.bytes}",
                    code="url.incomplete-checkpoint",
                )
        self._store.write(f"{folder.name}/{MANIFEST}", text)
        self._clear(folder.name, uploaded, exclude=inside)

    def fetch(self, folder: Path) -> None:
        """Download a checkpoint to this host, unless exactly this one is already here.

        Several ranks of a host may ask at once: the first one downloads it.

        Raises:
            CheckpointError: it is not complete. The error names the reason.
        """
        text = self._text(folder.name)
        with _locked(folder.parent):
            if not _is_here(folder, text):
                self._replace(folder, text)

    def download(self, name: str, target: Path) -> None:
        """Download a checkpoint into a directory.

        Raises:
            CheckpointError: it is not complete. The error names the reason.
        """
        self._download(name, self._text(name), target)

    def _text(self, name: str) -> bytes:
        text = self._store.read(f"{name}/{MANIFEST}")
        if text is None:
            raise manifest.missing_manifest()
        return text

    def copy(self, name: str, to: str) -> None:
        """Also keep a checkpoint under another name."""
        text = self._store.read(f"{name}/{MANIFEST}")
        if text is None:
            raise RemoteStoreError(
                f"{self._store.url}/{name} has no {MANIFEST}", code="url.incomplete-checkpoint"
            )
        listed = manifest.parse(text)
        inside = listed.save
        for file in listed.files:
            self._store.copy(f"{name}/{inside}/{file}", f"{to}/{inside}/{file}")
        self._store.write(f"{to}/{MANIFEST}", text)
        self._clear(to, self._store.files(to), exclude=f"{to}/{inside}")

    def marked(self, mark: str) -> dict[str, bytes]:
        """Return the content of a mark of each checkpoint that has it, by the checkpoint's name."""
        found = {name: self._store.read(name) for name in self._store.matching(f"step-*/{mark}")}
        return {name.split("/")[0]: text for name, text in found.items() if text is not None}

    def mark(self, name: str, mark: str, text: bytes) -> None:
        self._store.write(f"{name}/{mark}", text)

    def unmark(self, name: str, mark: str) -> None:
        self._store.remove(f"{name}/{mark}")

    def reject(self, name: str) -> None:
        """Disable a checkpoint that cannot be used. Its files remain."""
        text = self._store.read(f"{name}/{MANIFEST}")
        if text is not None:
            self._store.write(f"{name}/{_REJECTED}", text)
            self._store.remove(f"{name}/{MANIFEST}")

    def remove(self, name: str) -> None:
        self._store.remove(f"{name}/{MANIFEST}")  # first: from now on the checkpoint does not exist
        self._store.remove(*self._store.files(name))

    def leftovers(self) -> dict[str, int]:
        """Return the names of checkpoints that were not finished, each with its bytes."""
        found = self._store.files()
        existing = _existing(found)
        sizes: dict[str, int] = defaultdict(int)
        for name, info in found.items():
            if name.split("/")[0] not in existing:
                sizes[name.split("/")[0]] += int(info.get("size") or 0)
        return dict(sizes)

    def remove_leftovers(self) -> None:
        found = list(self._store.files())
        existing = _existing(found)
        self._store.remove(*(name for name in found if name.split("/")[0] not in existing))
        inside: dict[str, set[str]] = defaultdict(set)
        for name in found:
            inside[name.split("/")[0]].add(name.rpartition("/")[0])
        for name in (each for each in existing if len(inside[each] - {each}) > 1):
            text = self._store.read(f"{name}/{MANIFEST}")
            with suppress(CheckpointError):  # the files of a damaged one are not known
                whole = f"{name}/{manifest.parse(text or '').save}"
                self._clear(name, (file for file in found if file.startswith(f"{name}/")), whole)
        try:
            self._store.remove_unfinished()
        except RemoteStoreError as error:  # not every key may list them
            logger.warning("uploads that were not finished may remain: %s", error)

    def _replace(self, folder: Path, text: bytes) -> None:
        tmp = folder.with_name(f".{folder.name}.aside-{secrets.token_hex(4)}")
        tmp.mkdir(parents=True)
        try:
            self._download(folder.name, text, tmp)
            shutil.rmtree(folder, ignore_errors=True)
            tmp.rename(folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)

    def _download(self, name: str, text: bytes, target: Path) -> None:
        listed = manifest.parse(text)
        inside = f"{name}/{listed.save}"
        missing = self._store.get({f"{inside}/{each}": target / each for each in listed.files})
        if missing:
            file = missing[0].rpartition("/")[2]
            raise CheckpointError(f"{file} is missing", code="checkpoint.missing-file")
        write_atomic(target / MANIFEST, text)

    def _clear(self, name: str, files: Iterable[str], exclude: str) -> None:
        """Remove the files of an earlier checkpoint of the same name."""
        inside = [file for file in files if "/" in file.removeprefix(f"{name}/")]
        self._store.remove(*(file for file in inside if not file.startswith(f"{exclude}/")))


def _existing(files: Iterable[str]) -> set[str]:
    """Return the names of the checkpoints, also of rejected ones, that have these files."""
    return {n.split("/")[0] for n in files if n.rpartition("/")[2] in (MANIFEST, _REJECTED)}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_here(folder: Path, text: bytes) -> bool:
    """Return whether this host has all files of a manifest; it may have written only a part."""
    try:
        if (folder / MANIFEST).read_bytes() != text:
            return False
        listed = manifest.parse(text).files
        return all((folder / name).stat().st_size == each.bytes for name, each in listed.items())
    except OSError:
        return False
