"""Finds what `checkpoint.init_from` names, and opens it: a run, a checkpoint or a file."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.errors import CheckpointError, DtrainError
from dtrain.run.files import write_atomic
from dtrain.run.manifest import NAME as MANIFEST
from dtrain.run.remote.runs import staging
from dtrain.run.remote.store import is_url
from dtrain.run.rundir import RunDir
from dtrain.train import collectives
from dtrain.train.checkpoint.directory import CheckpointDirectory
from dtrain.train.checkpoint.files import OpenCheckpoint
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.store import agreed_reason
from dtrain.train.context import TrainContext
from dtrain.train.weights import formats
from dtrain.words import few

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Stored weights, open to be read."""

    tensors: formats.Tensors
    checkpoint: str = ""
    """The name of the checkpoint, if it is one of a run."""
    rejected: dict[str, str] = field(default_factory=dict)
    """The reasons why newer checkpoints are not used, by name."""


@contextlib.contextmanager
def opened(location: str, context: TrainContext) -> Iterator[Source]:
    """Open the weights at a path or URL. All ranks call this.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
        UsageError: the package that reads them is missing.
    """
    with _named(location), contextlib.ExitStack() as files:
        yield _source(location, context, files)


@contextlib.contextmanager
def _named(location: str) -> Iterator[None]:
    """Begin the text of errors with the location."""
    what = f"checkpoint.init_from: {location}: "
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(what + str(error), code=error.code) from error


def _source(location: str, context: TrainContext, files: contextlib.ExitStack) -> Source:
    try:
        if is_url(location):
            return _at_url(location, context, files)
        return _at_path(Path(location), context, files)
    except DtrainError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"it cannot be read: {error.strerror or error}", code="checkpoint.unreadable-file"
        ) from error


def _at_path(path: Path, context: TrainContext, files: contextlib.ExitStack) -> Source:
    if path.is_file():
        return Source(formats.of_file(path, files))
    if path.is_dir():
        return _in_directory(path, context, files)
    if path.exists():
        raise CheckpointError(
            "it is neither a file nor a directory", code="checkpoint.init-other-format"
        )
    host = f", on the host of rank {context.ranks.rank}" if context.ranks.world_size > 1 else ""
    raise CheckpointError(
        f"there is no such file or directory{host}", code="checkpoint.init-not-found"
    )


def _in_directory(path: Path, context: TrainContext, files: contextlib.ExitStack) -> Source:
    if (path / MANIFEST).is_file():
        return _checkpoint(path, files)
    if RunDir(path).checkpoints.is_dir():
        return _newest(RunDir(path), context, files)
    for name in formats.HUGGING_FACE:
        if (path / name).is_file():
            return Source(formats.of_file(path / name, files))
    names = sorted(os.listdir(path))
    raise CheckpointError(
        "the directory is neither a run nor a checkpoint of dtrain, and has none of "
        f"{', '.join(formats.HUGGING_FACE)}; it has {few(names) or 'no files'}. Name the run, the "
        "checkpoint or the file",
        code="checkpoint.init-other-format",
    )


def _checkpoint(folder: Path, files: contextlib.ExitStack) -> Source:
    """Open a checkpoint of dtrain; what is read of it is verified then."""
    checkpoint = files.enter_context(OpenCheckpoint(folder))
    return Source(formats.of_checkpoint(checkpoint), folder.name)


def _newest(run: RunDir, context: TrainContext, files: contextlib.ExitStack) -> Source:
    """Open the newest checkpoint of a run that is intact on all ranks. The run is only read."""
    ranks, directory = context.ranks, CheckpointDirectory(run, Retention(1))
    found = [each.name for each in directory.newest_first()] if ranks.is_rank_zero else []
    rejected: dict[str, str] = {}
    for name in collectives.from_zero(found):
        sources: list[Source] = []

        def read(folder: Path = run.checkpoints / name, into: list[Source] = sources) -> None:
            directory.fetch(folder)
            checkpoint = files.enter_context(OpenCheckpoint(folder))
            checkpoint.verify(ranks.rank, ranks.world_size)
            into.append(Source(formats.of_checkpoint(checkpoint), folder.name, rejected))

        reason = agreed_reason(read, of_ranks=False)
        if reason is None:
            return sources[0]
        rejected[name] = reason
        if ranks.is_rank_zero:
            logger.warning("checkpoint.init_from: %s is not used: %s", name, reason)
    if not rejected:
        raise CheckpointError("the run has no checkpoint", code="checkpoint.init-not-found")
    listed = "".join(f"\n  {name}: {why}" for name, why in rejected.items())
    raise CheckpointError(
        f"none of the run's {len(rejected)} checkpoints can be used:{listed}",
        code="checkpoint.init-none-intact",
    )


def _at_url(url: str, context: TrainContext, files: contextlib.ExitStack) -> Source:
    """Open a run at a URL, or one of its checkpoints, which is copied to this host meanwhile."""
    run_url, _, name = url.rstrip("/").partition("/checkpoints/")
    runs, _, run_id = run_url.rpartition("/")
    here = RunDir(staging(runs) / f".{run_id}-for-{context.run.id}")
    here.path.mkdir(parents=True, exist_ok=True)
    write_atomic(here.url_file, run_url, mode=0o600)

    def remove(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            collectives.gather_to_all(None)  # until no rank of this host reads it any more
        if context.ranks.local_rank == 0:
            shutil.rmtree(here.path, ignore_errors=True)

    files.push(remove)
    if not name:
        return _newest(here, context, files)
    folder = here.checkpoints / name
    CheckpointDirectory(here, Retention(1)).fetch(folder)
    return _checkpoint(folder, files)
