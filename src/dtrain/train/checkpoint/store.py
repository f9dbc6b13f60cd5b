"""All checkpoints of a run. All ranks save together, and load the newest one that is intact."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dtrain import memory
from dtrain.errors import CheckpointError
from dtrain.ranks import RankInfo
from dtrain.run.manifest import Entry
from dtrain.run.rundir import RunDir
from dtrain.train import collectives
from dtrain.train.checkpoint.content import Contribution, read
from dtrain.train.checkpoint.directory import (
    CheckpointDirectory,
    Failure,
    Written,
    of_other_step,
    step_of,
)
from dtrain.train.checkpoint.files import OpenCheckpoint, new_save, part_name
from dtrain.train.checkpoint.headers import Described
from dtrain.train.checkpoint.parts import Image
from dtrain.train.checkpoint.retention import SCORE, Retention
from dtrain.train.checkpoint.writer import Writer
from dtrain.train.packed import exchanged
from dtrain.words import few

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

exchanged(Entry)
exchanged(Written)
exchanged(Failure)
_SMALL = 8 << 20
"""A part with fewer bytes is written at once: that takes no longer than to hand it over."""
_MOST_THREADS = 4
"""Threads of a rank that copy. One copies 5 GB/s, two 9 GB/s; a few reach the limit of memory."""


@dataclass
class Loaded:
    folder: Path
    tensors: dict[str, Any]
    progress: dict[str, Any]
    rejected: dict[str, str] = field(default_factory=dict)
    """The reasons why newer checkpoints could not be used, by name."""
    close: Callable[[], None] = lambda: None
    """Closes its files. Afterwards no stored tensor can be read."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was saved."""

    folder: Path
    bytes: int
    """The size of all ranks' files of tensors."""
    seconds: float
    """The time from the beginning of the save until it was on disk."""
    write_seconds: float
    """The time that the slowest rank needed to write its part."""


@dataclass
class _Save:
    """A save in progress."""

    folder: Path
    name: str
    texts: dict[str, str]
    about: dict[str, Any]
    started: float
    result: Written | bool | Failure | None = None
    """The result of what this rank's writer does now: its part, then on rank 0 the manifest."""
    bytes: int = 0
    """The bytes of all ranks, on rank 0, once they have written their parts."""
    write_seconds: float = 0.0
    """The time of the slowest rank, on rank 0, likewise."""
    parts_written: bool = False


class CheckpointStore:
    """The checkpoints of one run. All ranks call its methods at the same moment.

    Args:
        run: the run.
        ranks: this process.
        retention: which checkpoints are kept when a newer one is complete.
        staging: the share of this host's memory in which its ranks keep copies of their state
            while they train on. 0 means that training waits until a checkpoint is written.
    """

    def __init__(
        self, run: RunDir, ranks: RankInfo, retention: Retention, staging: float = 0.0
    ) -> None:
        self._ranks = ranks
        self._directory = CheckpointDirectory(run, retention)
        self._staging = int(staging * memory.total() / ranks.local_world_size) if staging else 0
        self._writer: Writer | None = None
        self._save: _Save | None = None
        self._lacks_room = False
        """Whether any rank has had no room for a copy; then a warning was given."""

    def save(
        self, step: int, content: Contribution, about: dict[str, Any], *, wait: bool = True
    ) -> Saved | None:
        """Save a checkpoint. No other save is in progress.

        Args:
            step: the number of optimizer steps done.
            content: what this rank writes.
            about: plain JSON for people; that of rank 0 is written.
            wait: whether to return when it is on disk. Otherwise a large state is copied, and
                written while the training goes on: then `proceed` or `finish` complete the save.

        Returns:
            The checkpoint; None if it is being written.

        Raises:
            CheckpointError: a rank could not write its part. Every rank raises it.
        """
        assert self._save is None
        started = time.monotonic()
        folder = self._directory.run.checkpoint(step)
        copied: list[Described] | Failure | None = None
        fits = _SMALL <= content.image.bytes <= self._staging
        if fits and not wait and not self._lacks_room:
            # already now, so that no rank waits for another before it copies
            copied = self._copy(folder, content.image)
        name, in_background = self._begin(folder, content, wait=wait)
        save = _Save(folder, name, content.texts, about, started)
        if in_background:
            self._save = save
            copied = copied or self._copy(folder, content.image)
            save.result = copied if isinstance(copied, Failure) else self._write(save, copied)
            return None
        rank = self._ranks.rank
        save.result = self._attempt(
            folder, lambda: self._directory.write(folder, name, rank, content.image.buffers())
        )
        self._collect(save, self._commit_now)
        return self._conclude(save)

    def prepare(self, size: int) -> None:
        """Prepare for a first save in the background, of a part of about so many bytes.

        Only this method and `state` are not called by all ranks.
        """
        if self._writer is None and _SMALL <= size <= self._staging:
            with contextlib.suppress(OSError):  # if it matters, the save reports it
                self._writer = self._new_writer()
                self._writer.prepare(size)

    @property
    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._save is not None

    def state(self) -> tuple[bool, bool]:
        """Return whether this rank's writer is busy, and whether it has failed."""
        save = self._save
        if save is None:
            return False, False
        if save.result is None:
            save.result = self._attempt(save.folder, self._of_writer().poll)
        return save.result is None, isinstance(save.result, Failure)

    def proceed(self) -> Saved | None:
        """Go on with the save in progress: no rank's writer is busy, or one has failed.

        Returns:
            The checkpoint if it is complete now.

        Raises:
            CheckpointError: the save failed. Every rank raises it.
        """
        save = self._save
        assert save is not None
        if save.result is None:  # another rank has failed, so this part is of no use
            self._end_writer()
        if not save.parts_written:
            self._collect(save, self._commit_later)
            if not collectives.from_zero(isinstance(save.result, Failure)):
                return None
        self._save = None
        return self._conclude(save)

    def finish(self) -> Saved | None:
        """Wait for the save in progress, if there is one. Return it.

        Raises:
            CheckpointError: the save failed. Every rank raises it.
        """
        saved = None
        while (save := self._save) is not None:
            if save.result is None:
                save.result = self._attempt(save.folder, self._of_writer().wait)
            saved = self.proceed()
        return saved

    def close(self) -> None:
        """End the writer process. A save in progress is lost."""
        self._end_writer()
        self._save = None

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # -- a save ------------------------------------------------------------------------------

    def _begin(self, folder: Path, content: Contribution, *, wait: bool) -> tuple[str, bool]:
        """Agree on a save.

        Returns:
            Its name, and whether it is written in the background.
        """
        if self._ranks.is_rank_zero:
            self._directory.remove_leftovers()
        mine = (content.structure, int(new_save(), 16), content.image.bytes, self._staging)
        numbers = collectives.gather_numbers(*mine)
        different = [rank for rank, each in enumerate(numbers) if each[0] != numbers[0][0]]
        if different:
            raise CheckpointError(
                f"cannot write checkpoint {folder.name}: the names, types or shapes of the state "
                f"on rank {few(different)} differ from those on rank 0",
                code="checkpoint.ranks-differ",
            )
        large = max(size for _, _, size, _ in numbers) >= _SMALL
        fits = all(size <= staging for _, _, size, staging in numbers)
        if large and not fits and not wait and self._staging:
            self._warn_once(max(size for _, _, size, _ in numbers))
        return f"{numbers[0][1]:08x}", large and fits and not wait

    def _warn_once(self, size: int) -> None:
        if not self._lacks_room and self._ranks.is_rank_zero:
            logger.warning(
                "checkpoints are written while training waits: a copy of a rank's state takes "
                "%.1f GB, and checkpoint.staging allows %.1f GB for each rank of this host",
                size / 1e9,
                self._staging / 1e9,
            )
        self._lacks_room = True

    def _copy(self, folder: Path, image: Image) -> list[Described] | Failure:
        def copy() -> list[Described]:
            if self._writer is None:
                self._writer = self._new_writer()
            return self._writer.copy(image)

        return self._attempt(folder, copy)

    def _write(self, save: _Save, pieces: list[Described]) -> Failure | None:
        writer = self._of_writer()
        return self._attempt(save.folder, lambda: writer.write(save.folder, save.name, pieces))

    def _collect(self, save: _Save, commit: Callable[[_Save, dict[str, Entry]], None]) -> None:
        """Collect what all ranks have written; on rank 0, let the manifest be written."""
        everyone = collectives.gather_to_zero(save.result)
        save.parts_written = True
        save.result = True
        if not self._ranks.is_rank_zero:
            return
        failed = [each for each in everyone if isinstance(each, Failure)]
        if failed:
            save.result = failed[0]
            return
        parts = {rank: each for rank, each in enumerate(everyone) if isinstance(each, Written)}
        entries = {part_name(rank): each.entry for rank, each in parts.items()}
        save.bytes = sum(entry.bytes for entry in entries.values())
        save.write_seconds = max((each.seconds for each in parts.values()), default=0.0)
        commit(save, entries)

    def _commit_now(self, save: _Save, entries: dict[str, Entry]) -> None:
        def commit() -> bool:
            self._directory.commit(save.folder, save.name, entries, save.texts, save.about)
            return True

        save.result = self._attempt(save.folder, commit)

    def _commit_later(self, save: _Save, entries: dict[str, Entry]) -> None:
        facts = {
            "entries": {name: asdict(each) for name, each in entries.items()},
            "texts": save.texts,
            "about": save.about,
        }
        writer = self._of_writer()
        folder, name = save.folder, save.name
        save.result = self._attempt(folder, lambda: writer.commit(folder, name, facts))

    def _conclude(self, save: _Save) -> Saved:
        failure = save.result if isinstance(save.result, Failure) else None
        known = collectives.from_zero((save.bytes, save.write_seconds, failure))
        size, write_seconds, failure = known
        if self._ranks.local_rank == 0:
            self._directory.discard(save.folder, save.name)
        if failure is not None:
            raise CheckpointError(failure.text, code=failure.code)
        return Saved(save.folder, size, time.monotonic() - save.started, write_seconds)

    def _new_writer(self) -> Writer:
        cores = len(os.sched_getaffinity(0)) // self._ranks.local_world_size
        return Writer(self._directory, self._ranks.rank, min(max(cores, 1), _MOST_THREADS))

    def _of_writer(self) -> Writer:
        assert self._writer is not None
        return self._writer

    def _attempt(self, folder: Path, action: Callable[[], Value]) -> Value | Failure:
        """Run an action of one rank. The others wait for its result, also if it fails."""
        try:
            return action()
        except Exception as error:
            self._end_writer()  # the next save starts another
            return Failure.of(folder, error)

    def keep_as(self, folder: Path, name: str) -> None:
        """Keep a checkpoint under a second name, which retention does not remove."""
        self._on_rank_zero(folder.with_name(name), lambda: self._directory.copy(folder, name))

    def score(self, folder: Path, metric: str, value: float) -> None:
        """Record the value of a metric, by which retention finds the best checkpoints."""
        content = {"metric": metric, "value": value}
        self._on_rank_zero(folder, lambda: self._directory.mark(folder, SCORE, content))

    def _on_rank_zero(self, folder: Path, action: Callable[[], None]) -> None:
        """Write something on rank 0. Every rank raises the error of a checkpoint's directory."""
        failure = None
        if self._ranks.is_rank_zero:
            try:
                action()
            except Exception as error:
                failure = Failure.of(folder, error)
        failure = collectives.from_zero(failure)
        if failure is not None:
            raise CheckpointError(failure.text, code=failure.code)

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
        checkpoints = self._directory.run.checkpoints
        for folder in (checkpoints / name for name in self._names()):
            loaded, reason = self._try(folder, apply, rejected)
            if reason is None:
                if self._ranks.is_rank_zero:
                    self._directory.set_aside(rejected)
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
            f"{self._directory.location}",
            code="checkpoint.none-loads",
        )

    def has_any(self) -> bool:
        """Return whether the run has a checkpoint, intact or not."""
        return bool(self._names())

    def _names(self) -> list[str]:
        """Return the names of the checkpoints that rank 0 sees, newest first."""
        names: list[str] = []
        if self._ranks.is_rank_zero:
            self._directory.remove_leftovers(remote=True)
            names = [folder.name for folder in self._directory.newest_first()]
        return collectives.from_zero(names)

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
            self._directory.fetch(folder)
            opened.append(files.enter_context(OpenCheckpoint(folder)))
            opened[0].verify(self._ranks.rank, self._ranks.world_size)

        def load() -> None:
            state, progress = read(opened[0])
            if progress.get("step") != step_of(folder):
                raise of_other_step(progress.get("step"))
            loaded.append(Loaded(folder, state, progress, why))
            apply(loaded[0])

        with files:
            reason = agreed_reason(verify, of_ranks=False) or agreed_reason(load, of_ranks=True)
            if reason is not None:
                return None, reason
            loaded[0].close = files.pop_all().close
        return loaded[0], None


def agreed_reason(action: Callable[[], None], *, of_ranks: bool) -> str | None:
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
