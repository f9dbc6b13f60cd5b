"""Killed before every single file operation: the newest checkpoint told as saved is there."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.checkpoint.directory import CheckpointDirectory
from dtrain.train.checkpoint.retention import Retention
from support import checkpoints

_OPERATIONS = {
    "open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate",
}  # fmt: skip
"""Audit events of what changes files; with `open` for reading, which does no harm here."""


def save(run: RunDir, step: int, keep: int = 2) -> Path:
    return checkpoints.save(checkpoints.store(run, keep), step, {"w": torch.arange(9)})


def keep_best(run: RunDir, folder: Path) -> None:
    checkpoints.store(run, 2).keep_as(folder, "best")


def scenario(run: RunDir, tell: Callable[[str], None]) -> None:
    """All that changes checkpoints: a save, retention, `best`, and a step saved again."""
    first = save(run, 5)
    tell("5")
    keep_best(run, first)
    for step in (6, 7, 7):
        folder = save(run, step)
        tell(str(step))
    keep_best(run, folder)
    tell("end")


def killed_before(number: int, run: RunDir) -> tuple[bool, list[str]]:
    """Fork a process that does it all, and is killed before its operation `number`.

    Returns:
        Whether it came to its end instead; and what it had told by then.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        count = itertools.count(1)

        def look(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _OPERATIONS and run.id in str(arguments[0]) and next(count) == number:
                os._exit(9)

        sys.addaudithook(look)
        scenario(run, lambda word: (os.write(writer, f"{word}\n".encode()), None)[1])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        words = told.read().split()
    _, status = os.waitpid(pid, 0)
    assert status in (0, 9 << 8), f"it ended with {status}"
    return status == 0, words


def newest(run: RunDir) -> int:
    found = checkpoints.store(run, 2).load_newest(lambda loaded: None)
    assert found is not None
    return int(found.progress["step"])


def best_of(run: RunDir, folder: Path) -> int | None:
    """The step of `best`, every byte of which is looked at; None when there is none."""
    CheckpointDirectory(run, Retention(2)).fetch(folder)
    return int(read_checkpoint(folder)[1]["step"])


def prepared(folder: Path, *, at_url: bool) -> RunDir:
    run = RunDir(folder / "killed-run")
    run.create()
    if at_url:
        run.url_file.write_text(f"file://{folder}/there/killed-run")
    keep_best(run, save(run, 4))
    return run


def kill_everywhere(folder: Path, at_url: bool) -> int:
    """In one process without threads, which forks; the number of operations."""
    os.fsync = lambda fd: None  # a kill takes nothing from the kernel; 3 times quicker
    for number in itertools.count(1):
        run = prepared(folder / str(number), at_url=at_url)
        ended, told = killed_before(number, run)
        where = f"killed before operation {number}, told {told}"
        steps = [int(word) for word in told if word != "end"]
        assert newest(run) >= max(steps, default=4), where
        assert newest(run) <= 7, where
        best = best_of(run, run.checkpoints / "best")
        assert best == 7 if ended else best in (4, 5, 7), where
        save(run, 8)
        root = Path(run.url.removeprefix("file://")) if run.url else run.path
        hidden = [str(path) for path in root.rglob("*") if ".aside-" in path.name]
        assert not hidden, f"{where}: {hidden}"
        assert newest(run) == 8, where
        if run.url:
            whole = {path.parent.parent for path in root.rglob(f"*/{checkpoints.TENSORS}")}
            left = [path for path in whole if len([*path.glob(f"*/{checkpoints.TENSORS}")]) > 1]
            assert not left, f"{where}: {left}"
        if ended:
            return number
    raise AssertionError


@pytest.mark.parametrize("at_url", [False, True], ids=["folder", "url"])
def test_a_kill_before_any_file_operation_loses_nothing(tmp_path: Path, at_url: bool) -> None:
    (operations,) = run_ranks(kill_everywhere, 1, tmp_path, at_url, timeout=300)
    assert operations > 60
