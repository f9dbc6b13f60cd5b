"""The checkpoints of a run as files: in its directory, and at its URL. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.errors import CheckpointError, DtrainError
from dtrain.run import manifest
from dtrain.run.files import write_atomic
from dtrain.run.manifest import Entry, Manifest, missing_manifest
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint import files
from dtrain.train.checkpoint.blocks import write_file
from dtrain.train.checkpoint.retention import PIN, SCORE, Marks, Retention, read_score

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Written:
    """The part of a rank that is written, and uploaded."""

    entry: Entry
    seconds: float
    """The time that it took."""


class CheckpointDirectory:
    """The checkpoints of one run, for one process.

    Args:
        run: the run.
        retention: which checkpoints are kept when a newer one is complete.
        patient: whether to wait for a server that is away for a minute.
    """

    def __init__(self, run: RunDir, retention: Retention, *, patient: bool = True) -> None:
        self.run = run
        self.retention = retention
        self._remote = RemoteCheckpoints.of(run, patient=patient)

    @property
    def location(self) -> str:
        url = self.run.url
        return str(self.run.checkpoints) if url is None else f"{url}/checkpoints"

    def newest_first(self) -> list[Path]:
        """Return the directories of the checkpoints of steps."""
        if self._remote is not None:
            found = self._remote.folders()
        elif self.run.checkpoints.is_dir():
            found = [path for path in self.run.checkpoints.iterdir() if is_step(path.name)]
        else:
            found = []
        return sorted(found, key=step_of, reverse=True)

    def exists(self, name: str) -> bool:
        """Return whether there is a checkpoint of that name, for example `best`."""
        if self._remote is not None:
            return self._remote.exists(name)
        return (self.run.checkpoints / name / manifest.NAME).exists()

    def manifests(self) -> dict[str, Manifest | CheckpointError]:
        """Return the manifest of everything here by its name, or why there is none.

        Besides the checkpoints of steps this is `best`, those that were rejected, whose names end
        in `.rejected`, and saves that are not complete. Only manifests are read.
        """
        if self._remote is not None:
            texts = self._remote.manifests()
            return {name: _or_error(partial(_parse, text)) for name, text in texts.items()}
        names = [each.name for each in self.run.checkpoints.glob("*") if each.is_dir()]
        return {
            name: _or_error(partial(manifest.read, self.run.checkpoints / name)) for name in names
        }

    def small_file(self, name: str, listed: Manifest, file: str) -> bytes | None:
        """Return the bytes of a small file of a checkpoint, not verified. None without it."""
        if self._remote is not None:
            return self._remote.small_file(name, listed, file)
        try:
            return (self.run.checkpoints / name / file).read_bytes()
        except OSError:
            return None

    def occupied(self, name: str) -> int:
        """Return how many bytes become free when a checkpoint is removed."""
        if self._remote is not None:
            return self._remote.size(name)
        found = [path.lstat() for path in (self.run.checkpoints / name).rglob("*")]
        # a file with another link is also in `best`
        return sum(each.st_size for each in found if each.st_nlink == 1)

    def remove_leftovers(self, *, remote: bool = False) -> None:
        """Remove what killed writers have left; at the URL too if `remote` is set."""
        with contextlib.suppress(OSError):  # a read-only directory can still be read
            files.remove_leftovers(self.run.checkpoints)
        if remote and self._remote is not None:
            self._remote.remove_leftovers()

    def write(self, folder: Path, save: str, rank: int, pieces: Iterable[Any]) -> Written:
        """Write the part of a rank, and upload it.

        Args:
            folder: the directory of the checkpoint.
            save: the name of the save.
            rank: the rank.
            pieces: buffers with the content of the file.

        Raises:
            OSError: the file system or the URL reported an error.
        """
        started = time.monotonic()
        name, temporary = files.part_name(rank), files.aside(folder, save)
        temporary.mkdir(parents=True, exist_ok=True)
        entry = write_file(temporary / name, pieces)
        if self._remote is not None:
            self._remote.upload(temporary / name, folder.name, save)
        return Written(entry, time.monotonic() - started)

    def commit(
        self,
        folder: Path,
        save: str,
        entries: Mapping[str, Entry],
        texts: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> None:
        """Make a checkpoint exist, of which every rank has written its part; remove old ones.

        Raises:
            OSError: the file system or the URL reported an error.
        """
        files.commit(folder, save, entries, texts, about)
        if self._remote is not None:
            for name in texts:
                self._remote.upload(folder / name, folder.name, save)
            self._remote.commit(folder)
        names = [folder.name, *(each.name for each in self.newest_first() if each != folder)]
        kept = self.retention.kept(names, self.marks())
        self.remove(name for name in names if name not in kept)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints, here and at the URL."""
        for name in names:
            if self._remote is not None:
                self._remote.remove(name)
            files.remove_checkpoint(self.run.checkpoints / name)

    def marks(self) -> dict[str, Marks]:
        """Return the marks of the checkpoints that have any, by name."""
        pinned, scores = self._marked(PIN), self._marked(SCORE)
        return {
            name: Marks(name in pinned, read_score(scores[name]) if name in scores else None)
            for name in {*pinned, *scores}
        }

    def _marked(self, mark: str) -> dict[str, bytes]:
        """Return the content of a mark of each checkpoint that has it, by the checkpoint's name."""
        if self._remote is not None:
            return self._remote.marked(mark)
        found: dict[str, bytes] = {}
        for path in self.run.checkpoints.glob(f"step-*/{mark}"):
            with contextlib.suppress(FileNotFoundError):  # the training has just removed it
                found[path.parent.name] = path.read_bytes()
        return found

    def mark(self, folder: Path, mark: str, content: Mapping[str, Any]) -> None:
        """Mark a checkpoint, which exists.

        Raises:
            OSError: the file system or the URL reported an error.
        """
        text = json.dumps(dict(content)) + "\n"
        if self._remote is not None:
            self._remote.mark(folder.name, mark, text.encode())
        else:
            write_atomic(folder / mark, text)

    def unmark(self, folder: Path, mark: str) -> None:
        """Remove a mark of a checkpoint, if it has that."""
        if self._remote is not None:
            self._remote.unmark(folder.name, mark)
        else:
            (folder / mark).unlink(missing_ok=True)

    def discard(self, folder: Path, save: str) -> None:
        """Remove the parts of a save that this host still has.

        They remain if it failed; and if they are at the URL, on hosts other than rank 0's.
        """
        shutil.rmtree(files.aside(folder, save), ignore_errors=True)

    def fetch(self, folder: Path) -> None:
        """Make sure that a checkpoint is on this host.

        Raises:
            CheckpointError: it is not complete. The error names the reason.
        """
        if self._remote is not None:
            self._remote.fetch(folder)

    @contextlib.contextmanager
    def present(self, folder: Path) -> Iterator[Path]:
        """Yield the directory of a checkpoint; of one at a URL, a copy that is downloaded now.

        The copy is removed afterwards. `fetch` instead uses an earlier one, which may be intact
        where that at the URL is not.

        Raises:
            CheckpointError: it is not complete. The error names the reason.
        """
        if self._remote is None:
            yield folder
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".verify-") as copy:
            self._remote.download(folder.name, Path(copy))
            yield Path(copy)

    def copy(self, folder: Path, name: str) -> None:
        """Keep a checkpoint under a second name, which retention does not remove."""
        if self._remote is None:
            files.copy_checkpoint(folder, folder.with_name(name))
        else:
            self._remote.copy(folder.name, name)

    def set_aside(self, rejected: Iterable[Path]) -> None:
        """Rename rejected checkpoints; retention would count them and remove intact ones."""
        for folder in rejected:
            if self._remote is not None:
                self._remote.reject(folder.name)
                continue
            renamed = folder.with_name(f"{folder.name}.rejected")
            try:
                shutil.rmtree(renamed, ignore_errors=True)
                os.rename(folder, renamed)
            except OSError as error:
                logger.warning("cannot rename %s: %s", folder, error.strerror)


def _parse(text: bytes | None) -> Manifest:
    if text is None:
        raise missing_manifest()
    return manifest.parse(text)


def _or_error(read: Callable[[], Manifest]) -> Manifest | CheckpointError:
    try:
        return read()
    except CheckpointError as error:
        return error


def is_step(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def step_of(folder: Path | str) -> int:
    return int(Path(folder).name.removeprefix("step-"))


def of_other_step(step: object) -> CheckpointError:
    """Return the error of a checkpoint in the directory of another step."""
    return CheckpointError(f"it belongs to step {step!r:.40}", code="checkpoint.wrong-directory")


class WriteError(CheckpointError):
    """A checkpoint cannot be written. The message names it."""


@dataclass(frozen=True)
class Failure:
    """A `WriteError` that one process sends to another."""

    text: str
    code: str

    @classmethod
    def of(cls, folder: Path, error: Exception) -> Failure:
        explanation = explained(folder, error)
        return cls(str(explanation), explanation.code)

    def error(self) -> WriteError:
        return WriteError(self.text, code=self.code)


def explained(folder: Path, error: Exception) -> WriteError:
    """Return the error of a checkpoint that cannot be written, with the reason."""
    if isinstance(error, WriteError):
        return error
    what, code = f"cannot write checkpoint {folder.name}: ", "checkpoint.cannot-write"
    if isinstance(error, DtrainError):
        return WriteError(what + str(error), code=error.code or code)
    if not isinstance(error, OSError):
        return WriteError(f"{what}{type(error).__name__}: {error}", code=code)
    what += error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        code = "checkpoint.no-space"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder.parent).free
            what += (
                f"; {free / 1e6:,.1f} MB are free there. Free some space, or write less "
                "(checkpoint.keep, checkpoint.every_steps). The earlier checkpoints are intact"
            )
    return WriteError(f"{what}\nin {folder.parent}", code=code)
