"""Verify whole checkpoints, on all cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtrain.checkpoints.lookup import Found
from dtrain.errors import CheckpointError
from dtrain.run import manifest
from dtrain.train.checkpoint.blocks import BLOCK, BlockFile
from dtrain.train.checkpoint.directory import is_step, of_other_step, step_of
from dtrain.train.checkpoint.files import PROGRESS, OpenCheckpoint


@dataclass(frozen=True)
class Damage:
    """A reason why a checkpoint is not intact."""

    code: str
    message: str


@dataclass
class Verified:
    """A checkpoint that was verified."""

    name: str
    """The name for people."""
    damage: list[Damage] = field(default_factory=list)
    bytes: int = 0
    """The bytes of the blocks that were read."""
    seconds: float = 0.0
    """The time that it took, without a download."""

    @property
    def intact(self) -> bool:
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "intact": self.intact}


def verify(found: Found) -> Verified:
    """Verify every block of every file of a checkpoint; of one at a URL, those that are there.

    Raises:
        OSError: the URL reported an error.
    """
    done = Verified(found.name)
    with ExitStack() as stack:
        try:
            folder = found.folder
            if found.directory is not None:
                folder = stack.enter_context(found.directory.present(folder))
            started = time.monotonic()
            done.bytes, done.damage = _verify_files(folder)
            done.damage = done.damage or _wrong_directory(folder, found.folder.name)
            done.seconds = time.monotonic() - started
        except CheckpointError as error:
            done.damage = [_as_damage(error)]
    return done


def _verify_files(folder: Path) -> tuple[int, list[Damage]]:
    """Return the number of bytes that were read, and what is damaged."""
    files: list[BlockFile] = []
    damage: list[Damage] = []
    with ExitStack() as stack:
        for name, entry in sorted(manifest.read(folder).files.items()):
            try:
                files.append(BlockFile(folder / name, entry))
                stack.callback(files[-1].close)
            except CheckpointError as error:
                damage.append(_as_damage(error))
        blocks = [(file, index) for file in files for index in range(file.num_blocks)]
        damage += _in_parallel(blocks)
    return sum(file.size for file in files), damage


def _in_parallel(blocks: Sequence[tuple[BlockFile, int]]) -> list[Damage]:
    """Verify blocks, on all cores: reading and digesting release the GIL."""
    damage: list[tuple[int, Damage]] = []
    numbers = iter(range(len(blocks)))  # each thread takes the next
    stop = threading.Event()

    def work() -> None:
        memory = bytearray(BLOCK)
        for number in numbers:
            if stop.is_set():
                return
            file, index = blocks[number]
            try:
                file.verify_block(index, memory)
            except CheckpointError as error:
                damage.append((number, _as_damage(error)))

    count = min(len(os.sched_getaffinity(0)), len(blocks))
    with ThreadPoolExecutor(max(1, count)) as pool:
        try:
            for each in [pool.submit(work) for _ in range(count)]:
                each.result()
        finally:
            stop.set()  # after a Ctrl-C
    return [each for _, each in sorted(damage, key=lambda pair: pair[0])]


def _wrong_directory(folder: Path, name: str) -> list[Damage]:
    """Return the damage of an intact checkpoint that belongs to another step than its name says."""
    if not is_step(name):
        return []
    with OpenCheckpoint(folder) as opened:
        step = opened.json(PROGRESS).get("step")
    return [] if step == step_of(name) else [_as_damage(of_other_step(step))]


def _as_damage(error: CheckpointError) -> Damage:
    return Damage(error.code, str(error))
