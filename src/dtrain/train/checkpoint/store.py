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
from typing import Any

from dtrain.errors import CheckpointError, DtrainError
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.rundir import RunDir
from dtrain.train import collectives
from dtrain.train.checkpoint.files import (
    copy_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Loaded:
    folder: Path
    tensors: dict[str, Any]
    progress: dict[str, Any]
    rejected: dict[str, str] = field(default_factory=dict)
    """The reasons why newer checkpoints could not be used, by name."""


class CheckpointStore:
    """The checkpoints of one run. Every method is called by every rank at the same moment."""

    def __init__(self, run: RunDir, rank: int, keep: int) -> None:
        self._run = run
        self._rank = rank
        self._keep = keep
        self._remote = RemoteCheckpoints.of(run)
        self._has_saved = False

    def save(
        self,
        step: int,
        tensors: Callable[[], dict[str, Any]],
        progress: dict[str, Any],
        about: dict[str, Any],
    ) -> tuple[Path, int]:
        """Write a checkpoint on rank 0; no rank continues before it is on disk.

        Args:
            step: the number of optimizer steps done.
            tensors: returns the values to write on rank 0, by file stem.
            progress: plain JSON.
            about: plain JSON for people.

        Returns:
            The directory of the checkpoint and the number of bytes written.

        Raises:
            CheckpointError: rank 0 could not write it. Every rank raises it.
        """
        folder = self._run.checkpoint(step)
        size, problem, code = 0, None, ""
        cause: Exception | None = None
        if self._rank == 0:
            try:
                remove_leftovers(self._run.checkpoints)
                size = write_checkpoint(folder, tensors(), progress, about)
                if self._remote is not None:
                    if not self._has_saved:
                        self._remote.remove_leftovers()
                    self._remote.upload(folder)
                    self._has_saved = True
                self._remove_old(folder)
            except Exception as error:  # the other ranks wait for the result of any error
                cause, (problem, code) = error, _explain(folder, error)
        size, problem, code = collectives.from_zero((size, problem, code))
        if problem is not None:
            raise CheckpointError(problem, code=code) from cause
        return folder, size

    def keep_as(self, folder: Path, name: str) -> None:
        """Keep a checkpoint under a second name, which retention does not remove."""
        problem, code = None, ""
        if self._rank == 0:
            try:
                if self._remote is None:
                    copy_checkpoint(folder, folder.with_name(name))
                else:
                    self._remote.copy(folder.name, name)
            except OSError as error:
                problem, code = _explain(folder.with_name(name), error)
        problem, code = collectives.from_zero((problem, code))
        if problem is not None:
            raise CheckpointError(problem, code=code)

    def load_newest(self, apply: Callable[[Loaded], None]) -> Loaded | None:
        """Read and apply the newest checkpoint that is intact and fits on every rank.

        Args:
            apply: loads it into the training. If it does not fit, `apply` raises
                `CheckpointError` before it changes anything.

        Returns:
            The checkpoint that was applied; None if the run has no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none can be used. The message lists why.
        """
        rejected: dict[Path, str] = {}
        names: list[str] = []
        if self._rank == 0:
            with contextlib.suppress(OSError):  # a read-only directory can still be read
                remove_leftovers(self._run.checkpoints)
            names = [folder.name for folder in self._candidates()]
        for folder in (self._run.checkpoints / name for name in collectives.from_zero(names)):
            loaded, reason = self._try(folder, apply, rejected)
            reasons = collectives.gather_to_all(reason)
            failures = [f"rank {r}: {text}" for r, text in enumerate(reasons) if text is not None]
            if not failures:
                self._set_aside(rejected)
                return loaded
            same = len(set(reasons)) == 1
            rejected[folder] = str(reasons[0]) if same else "; ".join(failures)
            if self._rank == 0:
                logger.warning("checkpoint %s is not used: %s", folder.name, rejected[folder])
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
        why = {path.name: reason for path, reason in rejected.items()}
        try:
            if self._remote is not None:
                self._remote.fetch(folder)
            loaded = Loaded(folder, *read_checkpoint(folder), rejected=why)
            if loaded.progress.get("step") != _step_of(folder):
                raise CheckpointError(
                    f"it belongs to step {loaded.progress.get('step')!r:.40}",
                    code="checkpoint.wrong-directory",
                )
            apply(loaded)
        except CheckpointError as error:
            return None, str(error)
        return loaded, None

    def _set_aside(self, rejected: dict[Path, str]) -> None:
        """Rename rejected checkpoints; retention would count them and remove intact ones."""
        if self._rank != 0:
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


def _explain(folder: Path, error: Exception) -> tuple[str, str]:
    """Return why a checkpoint cannot be written, and the code of that error."""
    what, code = f"cannot write checkpoint {folder.name}: ", "checkpoint.cannot-write"
    if isinstance(error, DtrainError):
        return what + str(error), error.code or code
    if not isinstance(error, OSError):
        return f"{what}{type(error).__name__}: {error}", code
    what += error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        code = "checkpoint.no-space"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder.parent).free
            what += (
                f"; {free / 1e6:,.1f} MB are free there. Free some space, or write less "
                "(checkpoint.keep, checkpoint.every_steps). The earlier checkpoints are intact"
            )
    return f"{what}\nin {folder.parent}", code
