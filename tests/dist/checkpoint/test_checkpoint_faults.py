"""Damaged checkpoints, changed models, full disks: no wrong is loaded, no good is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import CheckpointError
from dtrain.testing import run_ranks
from support.checkpoints import TENSORS
from support.errors import assert_named, raises
from support.trainings import Outcome, job, lines, train


def run(world_size: int, folder: Path, **sections: Any) -> list[Outcome]:
    args = sections.pop("args", {})
    sections.setdefault("checkpoint", {"every_steps": 4, "keep": 3})
    strategy = "ddp" if world_size > 1 else "single"
    return run_ranks(train, world_size, job(strategy, args, **sections), folder)


def flip(path: Path, offset: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1
    path.write_bytes(data)


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A run of two ranks that was killed after step 9, with checkpoints of steps 4 and 8."""
    run(2, tmp_path, args={"crash_after": 9})
    return tmp_path


def test_a_damaged_checkpoint_is_seen_and_the_older_one_used(
    crashed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    unbroken = run(2, tmp_path_factory.mktemp("unbroken"))
    flip(crashed / "checkpoints" / "step-00000008" / TENSORS, 1000)
    outcomes = run(2, crashed)
    (resumed,) = [line for line in lines(crashed, "events") if line["event"] == "resumed"]
    assert resumed["step"] == 4
    ((name, reason),) = resumed["rejected"].items()
    assert name == "step-00000008"
    assert_named(reason, [f"{TENSORS} ", "damaged", "xxh3"])
    assert outcomes[0].result is not None
    assert unbroken[0].result is not None
    assert outcomes[0].result.parameters_sha256 == unbroken[0].result.parameters_sha256
    # the bad one is out of the way, and was written anew
    kept = sorted(path.name for path in (crashed / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000008.rejected", "step-00000010"]


def test_files_of_another_step_are_seen(crashed: Path) -> None:
    one, other = (crashed / "checkpoints" / f"step-0000000{step}" / TENSORS for step in (4, 8))
    assert one.stat().st_size == other.stat().st_size
    other.write_bytes(one.read_bytes())
    run(2, crashed)
    (resumed,) = [line for line in lines(crashed, "events") if line["event"] == "resumed"]
    assert resumed["step"] == 4
    assert list(resumed["rejected"]) == ["step-00000008"]


def test_when_none_can_be_used_training_does_not_begin_again(crashed: Path) -> None:
    for folder in (crashed / "checkpoints").iterdir():
        flip(folder / TENSORS, 1000)
    damaged = [f"step-{step:08d}: {TENSORS} is damaged" for step in (4, 8)]
    with raises("checkpoint.none-loads", *damaged, kind=CheckpointError):
        run(2, crashed)
    assert len(list((crashed / "checkpoints").glob("step-????????"))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"args": {"width": 17}}, "first.weight is (16, 6), in the model (17, 6)"),
        ({"args": {"spare": "never"}}, "spare.weight is not in the checkpoint"),
        ({"args": {"n": 51}}, "num_samples was 50, is 51"),
        ({"seed": 4}, "seed was 3, is 4"),
    ],
)
def test_another_model_or_other_data_is_refused(
    crashed: Path, change: dict[str, Any], words: str
) -> None:
    with raises("checkpoint.none-loads", words):
        run(2, crashed, **change)


def test_a_leftover_of_a_killed_writer_is_ignored_and_removed(crashed: Path) -> None:
    leftover = crashed / "checkpoints" / ".step-00000012.aside-0011"
    leftover.mkdir()
    (leftover / TENSORS).write_bytes(b"half")
    run(2, crashed)
    assert not leftover.exists()
    (resumed,) = [line for line in lines(crashed, "events") if line["event"] == "resumed"]
    assert resumed["step"] == 8


def test_a_full_disk_is_one_clear_error_and_the_old_checkpoint_stays(small_disk: Path) -> None:
    # 200 kB each: parameters and momentum
    args = {"width": 3000}
    place = f"\nin {small_disk / 'checkpoints'}"
    with raises("checkpoint.no-space", "MB are free", place, kind=CheckpointError) as caught:
        run(2, small_disk, args=args, checkpoint={"every_steps": 2, "keep": 5})
    message = str(caught.value.__cause__)
    assert re.match(r"cannot write checkpoint step-\d+: No space left on device; ", message)
    checkpoints = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert checkpoints
    assert all(name.startswith("step-") for name in checkpoints)  # nothing half-written
    (small_disk / "checkpoints" / checkpoints[0] / TENSORS).read_bytes()
    manifest = json.loads(
        (small_disk / "checkpoints" / checkpoints[-1] / "manifest.json").read_text()
    )
    assert manifest["about"]["world_size"] == 2
