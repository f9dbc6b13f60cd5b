"""All checkpoints of a run. All ranks save together, and load the newest one that is intact."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dtrain.errors import CheckpointError, DtrainError
from dtrain.ranks import RankInfo
from dtrain.run.manifest import Entry
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.rundir import RunDir
from dtrain.train import collectives
from dtrain.train.checkpoint.content import Contribution, read
from dtrain.train.checkpoint.files import (
    OpenCheckpoint,
    aside,
    commit,
    copy_checkpoint,
    new_save,
    part_name,
    remove_checkpoint,
    remove_leftovers,
)
from dtrain.train.checkpoint.parts import write_part
from dtrain.train.packed import exchanged
from dtrain.words import few

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

exchanged(Entry)
_NAME = re.compile(r"step-\d{8,}")


@dataclass
class Loaded:
    folder: Path
    tensors: dict[str, Any]
    progress: dict[str, Any]
    rejected: dict[str, str] = field(default_factory=dict)
    """The reasons why newer checkpoints could not be used, by name."""
    close: Callable[[], None] = lambda: None
    """Closes its files. Afterwards no stored tensor can be read."""


class CheckpointStore:
    """The checkpoints of one run. Every method is called by every rank at the same moment."""

    def __init__(self, run: RunDir, ranks: RankInfo, keep: int) -> None:
        self._run = run
        self._ranks = ranks
        self._keep = keep
        self._remote = RemoteCheckpoints.of(run)

    def save(self, step: int, content: Contribution, about: dict[str, Any]) -> tuple[Path, int]:
        """Write a checkpoint on all ranks; no rank continues before it is on disk.

        Args:
            step: the number of optimizer steps done.
            content: what this rank writes.
            about: plain JSON for people; that of rank 0 is written.

        Returns:
            The directory of the checkpoint and the number of bytes written by all ranks.

        Raises:
            CheckpointError: a rank could not write its part. Every rank raises it.
        """
        folder = self._run.checkpoint(step)
        save = self._begin(step, content)
        written = self._attempt(folder, lambda: self._write_part(folder, save, content))
        everyone = collectives.gather_to_zero(written)
        size: int = 0
        failure: _Failure | None = None
        if self._ranks.is_rank_zero:
            failure = next((each for each in everyone if isinstance(each, _Failure)), None)
            if failure is None:
                entries = dict(each for each in everyone if not isinstance(each, _Failure))
                size = sum(entry.bytes for entry in entries.values())
                done = self._attempt(
                    folder, lambda: self._commit(folder, save, entries, content, about)
                )
                failure = done if isinstance(done, _Failure) else None
            if failure is not None:
                shutil.rmtree(aside(folder, save), ignore_errors=True)
        size, failure = collectives.from_zero((size, failure))
        if failure is not None:
            raise failure.error()
        return folder, size

    def _begin(self, step: int, content: Contribution) -> str:
        """Remove what killed writers have left, and return the name of the save for all ranks."""
        if self._ranks.is_rank_zero:
            with contextlib.suppress(OSError):  # a full or read-only disk: writing fails below
                remove_leftovers(self._run.checkpoints)
        save = new_save()
        numbers = collectives.gather_numbers(content.structure, int(save, 16))
        different = [rank for rank, each in enumerate(numbers) if each[0] != numbers[0][0]]
        if different:
            raise CheckpointError(
                f"cannot write checkpoint {self._run.checkpoint(step).name}: the names, types or "
                f"shapes of the state on {few(different)} differ from those on rank 0",
                code="checkpoint.ranks-differ",
            )
        return f"{numbers[0][1]:08x}"

    def _write_part(self, folder: Path, save: str, content: Contribution) -> tuple[str, Entry]:
        name, temporary = part_name(self._ranks.rank), aside(folder, save)
        temporary.mkdir(parents=True, exist_ok=True)
        entry = write_part(temporary / name, content.image)
        if self._remote is not None:
            self._remote.upload(temporary / name, folder.name, save)
        return name, entry

    def _commit(
        self,
        folder: Path,
        save: str,
        entries: dict[str, Entry],
        content: Contribution,
        about: dict[str, Any],
    ) -> None:
        commit(folder, save, entries, content.texts, about)
        if self._remote is not None:
            for name in content.texts:
                self._remote.upload(folder / name, folder.name, save)
            self._remote.commit(folder)
        self._remove_old(folder)

    def _attempt(self, folder: Path, action: Callable[[], Value]) -> Value | _Failure:
        """Run an action of one rank. The others wait for its result, also if it fails."""
        try:
            return action()
        except Exception as error:
            explained = _explained(folder, error)
            return _Failure(str(explained), explained.code)

    def keep_as(self, folder: Path, name: str) -> None:
        """Keep a checkpoint under a second name, which retention does not remove."""

        def copy() -> None:
            if self._remote is None:
                copy_checkpoint(folder, folder.with_name(name))
            else:
                self._remote.copy(folder.name, name)

        failure = None
        if self._ranks.is_rank_zero:
            failure = self._attempt(folder.with_name(name), copy)
        failure = collectives.from_zero(failure)
        if failure is not None:
            raise failure.error()

    def load_newest(
        self, apply: Callable[[Loaded], None], *, keep_open: bool = False
    ) -> Loaded | None:
        """Read and apply the newest checkpoint that is intact and fits on every rank.

        Args:
            apply: loads it into the training. If it does not fit, `apply` raises
                `CheckpointError` before it changes anything.
            keep_open: whether the caller reads tensors afterwards, and closes what is returned.

        Returns:
            The checkpoint that was applied; None if the run has no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none can be used. The message lists why.
        """
        rejected: dict[Path, str] = {}
        names: list[str] = []
        if self._ranks.is_rank_zero:
            with contextlib.suppress(OSError):  # a read-only directory can still be read
                remove_leftovers(self._run.checkpoints)
            names = [folder.name for folder in self._candidates()]
            if self._remote is not None:
                self._remote.remove_leftovers()
        for folder in (self._run.checkpoints / name for name in collectives.from_zero(names)):
            loaded, reason = self._try(folder, apply, rejected)
            if reason is None:
                self._set_aside(rejected)
                if loaded is not None and not keep_open:
                    loaded.close()
                return loaded
            rejected[folder] = reason
            if self._ranks.is_rank_zero:
                logger.warning("checkpoint %s is not used: %s", folder.name, reason)
        if not rejected:
            return None
        listed = "".join(f"\n  {folder.name}: {why}" for folder, why in rejected.items())
        raise CheckpointError(
            f"none of the {len(rejected)} checkpoints can be used, and starting again at step 0 "
            f"would hide that:{listed}\nto start again, move them away; they are in "
            f"{self._location}",
            code="checkpoint.none-loads",
        )

    @property
    def _location(self) -> str:
        url = self._run.url
        return str(self._run.checkpoints) if url is None else f"{url}/checkpoints"

    def _candidates(self) -> list[Path]:
        if self._remote is not None:
            return sorted(self._remote.folders(), key=_step_of, reverse=True)
        if not self._run.checkpoints.is_dir():
            return []
        found = [path for path in self._run.checkpoints.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def _try(
        self, folder: Path, apply: Callable[[Loaded], None], rejected: dict[Path, str]
    ) -> tuple[Loaded | None, str | None]:
        """Verify a checkpoint, and apply it if it is intact on all ranks.

        Returns:
            What was loaded; or the reason why it cannot be used, the same on all ranks.
        """
        why = {path.name: reason for path, reason in rejected.items()}
        files = contextlib.ExitStack()
        opened: list[OpenCheckpoint] = []
        loaded: list[Loaded] = []

        def verify() -> None:
            if self._remote is not None:
                self._remote.fetch(folder)
            opened.append(files.enter_context(OpenCheckpoint(folder)))
            opened[0].verify(self._ranks.rank, self._ranks.world_size)

        def load() -> None:
            state, progress = read(opened[0])
            if progress.get("step") != _step_of(folder):
                raise CheckpointError(
                    f"it belongs to step {progress.get('step')!r:.40}",
                    code="checkpoint.wrong-directory",
                )
            loaded.append(Loaded(folder, state, progress, why))
            apply(loaded[0])

        with files:
            reason = _reason(verify, of_ranks=False) or _reason(load, of_ranks=True)
            if reason is not None:
                return None, reason
            loaded[0].close = files.pop_all().close
        return loaded[0], None

    def _set_aside(self, rejected: dict[Path, str]) -> None:
        """Rename rejected checkpoints; retention would count them and remove intact ones."""
        if not self._ranks.is_rank_zero:
            return
        for folder in rejected:
            if self._remote is not None:
                self._remote.reject(folder.name)
                continue
            aside = folder.with_name(f"{folder.name}.rejected")
            try:
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
            except OSError as error:
                logger.warning("cannot rename %s: %s", folder, error.strerror)

    def _remove_old(self, newest: Path) -> None:
        """Remove old checkpoints; the one that was just written always stays."""
        others = [folder for folder in self._candidates() if folder != newest]
        for folder in others[self._keep - 1 :]:
            if self._remote is not None:
                self._remote.remove(folder.name)
            remove_checkpoint(folder)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _reason(action: Callable[[], None], *, of_ranks: bool) -> str | None:
    """Run an action on every rank. Return why it failed on some of them; None if on none.

    Args:
        action: raises `CheckpointError`.
        of_ranks: whether the ranks do different things, so that the reason names them.
    """
    reason = None
    try:
        action()
    except CheckpointError as error:
        reason = str(error)
    everyone = collectives.gather_to_all(reason)
    if of_ranks and len(set(everyone)) > 1:
        everyone = [text and f"rank {rank}: {text}" for rank, text in enumerate(everyone)]
    return "; ".join(text for text in dict.fromkeys(everyone) if text) or None


@exchanged
@dataclass(frozen=True)
class _Failure:
    """Why a rank could not write its part."""

    text: str
    code: str

    def error(self) -> CheckpointError:
        return CheckpointError(self.text, code=self.code)


def _explained(folder: Path, error: Exception) -> CheckpointError:
    """Return the error of a checkpoint that cannot be written."""
    what, code = f"cannot write checkpoint {folder.name}: ", "checkpoint.cannot-write"
    if isinstance(error, DtrainError):
        return CheckpointError(what + str(error), code=error.code or code)
    if not isinstance(error, OSError):
        return CheckpointError(f"{what}{type(error).__name__}: {error}", code=code)
    what += error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        code = "checkpoint.no-space"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder.parent).free
            what += (
                f"; {free / 1e6:,.1f} MB are free there. Free some space, or write less "
                "(checkpoint.keep, checkpoint.every_steps). The earlier checkpoints are intact"
            )
    return CheckpointError(f"{what}\nin {folder.parent}", code=code)
