"""Checkpoints that a process of their own writes while the training goes on."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dtrain.errors import CheckpointError
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checkpoint import store
from dtrain.train.checkpoint.content import contribution, read_checkpoint
from dtrain.train.checkpoint.parts import Image
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.writer import Staging, Writer
from dtrain.train.digest import texts_of_each
from dtrain.train.loop.native import NativeTrainer
from dtrain.train.loop.progress import best_interval
from support.errors import raises
from support.lightning_fit import fit
from support.trainings import Outcome, job, lines, train

ALL = [2, 4, 6, 8, 10]


class Held(Writer):
    """A writer whose first process stands still, until training waits or has polled 5 times."""

    held: psutil.Process | None = None
    made = polls = 0
    then = staticmethod(psutil.Process.resume)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        Held.made += 1
        if Held.made == 1:
            Held.held = psutil.Process(self._process.pid)
            Held.held.suspend()

    def poll(self) -> Any:
        Held.polls += 1
        if Held.polls == 5:
            self._let_go()
        return super().poll()

    def wait(self) -> Any:
        self._let_go()
        return super().wait()

    def _let_go(self) -> None:
        if Held.held is not None:
            self.then(Held.held)
            Held.held = None


class Killed(Held):
    """A writer whose first process is killed while it writes."""

    then = staticmethod(psutil.Process.kill)


def in_background(spec: Any, folder: Path, writer: Any = Writer, **more: Any) -> Outcome:
    """Train with the smallest state written in the background too."""
    store._SMALL = 0
    store.Writer = writer
    return train(spec, folder, **more)


def steps(folder: Path, event: str) -> list[int]:
    return [line["step"] for line in lines(folder, "events") if line["event"] == event]


def states(folder: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for path in sorted((folder / "checkpoints").glob("step-*")):
        state, _ = read_checkpoint(path)
        tensors = dict(state["model"])
        for name, values in state["optimizer"]["state"].items():
            tensors |= {f"{name}.{key}": value for key, value in values.items()}
        yield path.name, tensors


@pytest.mark.parametrize(
    ("strategy", "trainer"), [("ddp", LightningTrainer), ("fsdp", NativeTrainer)]
)
def test_they_are_those_that_training_waits_for(
    strategy: str, trainer: type[NativeTrainer], tmp_path: Path
) -> None:
    """The state is that of the step, though training changes it while it is written."""
    checkpoint = {"every_steps": 2, "keep": 9}
    for name, staging in (("waits", 0), ("goes-on", 0.25)):
        spec = job(strategy, {"optimizer": "adamw"}, checkpoint={**checkpoint, "staging": staging})
        run_ranks(in_background, 2, spec, tmp_path / name, trainer_class=trainer)
    assert steps(tmp_path / "goes-on", "checkpoint_saved") == ALL
    pairs = zip(states(tmp_path / "waits"), states(tmp_path / "goes-on"), strict=True)
    for (one_name, one), (other_name, other) in pairs:
        assert one_name == other_name
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), one_name


def test_a_run_that_is_killed_goes_on_from_one(tmp_path: Path) -> None:
    args = {"optimizer": "adamw", "dropout": 0.2}
    checkpoint = {"every_steps": 2}
    unbroken = run_ranks(in_background, 2, job("ddp", args), tmp_path / "unbroken")
    killed = job("ddp", {**args, "crash_after": 7}, checkpoint=checkpoint)
    run_ranks(in_background, 2, killed, tmp_path / "killed")
    resumed = run_ranks(in_background, 2, job("ddp", args), tmp_path / "killed")
    assert steps(tmp_path / "killed", "resumed")[0] in (4, 6)
    pairs = zip(unbroken, resumed, strict=True)
    for one, other in pairs:
        assert one.result is not None
        assert other.result is not None
        assert one.result.parameters_sha256 == other.result.parameters_sha256


def test_one_that_is_due_meanwhile_waits(tmp_path: Path) -> None:
    spec = job("ddp", checkpoint={"every_steps": 2, "keep": 9})
    run_ranks(in_background, 2, spec, tmp_path, Held)
    assert steps(tmp_path, "checkpoint_saved") == ALL
    assert 4 in steps(tmp_path, "checkpoint_waited")


def test_one_that_is_due_meanwhile_is_skipped_if_the_job_says_so(tmp_path: Path) -> None:
    spec = job("ddp", checkpoint={"every_steps": 2, "keep": 9, "busy": "skip"})
    run_ranks(in_background, 2, spec, tmp_path, Held)
    saved, skipped = steps(tmp_path, "checkpoint_saved"), steps(tmp_path, "checkpoint_skipped")
    assert sorted(saved + skipped) == ALL
    assert 4 in skipped
    assert {2, 10} <= set(saved)  # the end waits
    assert [int(name[-8:]) for name, _ in states(tmp_path)] == saved
    (counts,) = [line for line in lines(tmp_path, "events") if line["event"] == "checkpoints"]
    assert (counts["saved"], counts["skipped"]) == (len(saved), len(skipped))


def test_the_best_is_never_skipped(tmp_path: Path) -> None:
    spec = job(
        "ddp",
        {"held_out": 8, "evaluations": [5.0, 1.0, 2.0, 3.0, 4.0]},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 2, "keep": 1, "busy": "skip", "best": {"metric": "loss"}},
    )
    run_ranks(in_background, 2, spec, tmp_path, Held)
    assert read_checkpoint(tmp_path / "checkpoints" / "best")[1]["step"] == 4


def test_a_grace_that_is_too_short_is_reported_at_once_and_at_the_stop(tmp_path: Path) -> None:
    short = {"stop_timeout": 1e-6}
    spec = job("ddp", {"stop_after": 4}, checkpoint={"every_steps": 2}, launch=short)
    run_ranks(in_background, 2, spec, tmp_path)
    assert steps(tmp_path, "grace_short") == [2, 5]
    assert steps(tmp_path, "checkpoint_saved") == [2, 4, 5]


def test_the_time_between_checkpoints_is_chosen(tmp_path: Path) -> None:
    """With a cost of a second, which is presumed first, it would be 0.05 s."""
    spec = job("ddp", checkpoint={"every": "auto", "mtbf": 0.05})
    run_ranks(in_background, 2, spec, tmp_path)
    (chosen,) = [e for e in lines(tmp_path, "events") if e["event"] == "checkpoint_interval"]
    expected = best_interval(chosen["stop_seconds"], 0.05)
    assert chosen["seconds"] == pytest.approx(expected, abs=0.001)
    assert len(steps(tmp_path, "checkpoint_saved")) > 1


def test_a_writer_that_dies_ends_the_training(tmp_path: Path) -> None:
    spec = job("ddp", checkpoint={"every_steps": 2})
    with raises("checkpoint.writer-ended", "step-00000002", "signal 9", kind=CheckpointError):
        run_ranks(in_background, 2, spec, tmp_path, Killed)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_writer_that_dies_is_replaced_if_the_job_says_so(tmp_path: Path) -> None:
    spec = job("ddp", checkpoint={"every_steps": 2, "keep": 9, "on_error": "warn"})
    run_ranks(in_background, 2, spec, tmp_path, Killed)
    assert steps(tmp_path, "checkpoint_failed") == [2]
    assert steps(tmp_path, "checkpoint_saved") == ALL[1:]


class Flips(Staging):
    """Memory that loses a bit, on rank 1."""

    def copy(self, image: Image) -> list[str]:
        digests = super().copy(image)
        if os.environ["RANK"] == "1":
            self._memory[image.bytes - 3] ^= 4
        return digests


def with_bad_memory(spec: Any, folder: Path) -> Outcome:
    from dtrain.train.checkpoint import writer

    writer.Staging = Flips  # type: ignore[misc]
    return in_background(spec, folder)


def test_a_copy_that_is_not_the_state_becomes_no_checkpoint(tmp_path: Path) -> None:
    spec = job("ddp", checkpoint={"every_steps": 2})
    with raises("checkpoint.copy-differs", "step-00000002", kind=CheckpointError):
        run_ranks(with_bad_memory, 2, spec, tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_threads_share_the_copy() -> None:
    sizes = [0, 1, 5, 300_000, 1 << 18, (1 << 19) + 3, 1, 700_001]
    tensors = {str(index): torch.randn(size) for index, size in enumerate(sizes)}
    image = contribution({"model": tensors}, {}, {}, 0, 1).image
    staging = Staging(threads=3)
    live = [piece.data for piece in image.pieces]
    assert staging.copy(image) == texts_of_each(live)
    copied = os.pread(staging.fd, image.bytes, 0)
    staging.close()
    assert copied == torch.cat([each.reshape(-1) for each in live]).numpy().tobytes()


def save_without_files(folder: Path) -> None:
    """Save when this process may open no more files, which ends the save but not the writer."""
    checkpoints = store.CheckpointStore(RunDir(folder), RankInfo(), Retention(1), staging=0.5)
    content = contribution({"model": {"w": torch.ones(3 << 20)}}, {}, {"step": 1}, 0, 1)
    checkpoints.prepare(content.image.bytes)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert checkpoints.save(1, content, {}, wait=False) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with raises("checkpoint.cannot-write", "Too many open files", kind=CheckpointError):
        checkpoints.finish()
    assert checkpoints.save(1, content, {}) is not None
    checkpoints.close()


def test_a_process_that_may_open_no_more_files(tmp_path: Path) -> None:
    RunDir(tmp_path).create()
    run_ranks(save_without_files, 1, tmp_path)


def save_one_row(folder: Path) -> int:
    """Save a tensor of one row, which one rank writes. Return the size of this rank's part."""
    ranks, run = RankInfo.from_env(), RunDir(folder)
    checkpoints = store.CheckpointStore(run, ranks, Retention(1), staging=0.5)
    model = {"w": torch.arange(3.0 * (1 << 20)).reshape(1, -1)}
    content = contribution({"model": model}, {}, {"step": 1}, ranks.rank, ranks.world_size)
    assert checkpoints.save(1, content, {}, wait=False) is None  # it is written in the background
    checkpoints.finish()
    checkpoints.close()
    state, _ = read_checkpoint(run.checkpoint(1))
    assert torch.equal(state["model"]["w"], model["w"])
    return content.image.bytes


def test_a_rank_that_has_nothing_to_write(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    sizes = run_ranks(save_one_row, 2, tmp_path)
    assert sorted(sizes) == [0, 12 << 20]


def test_a_full_disk_ends_the_training_and_the_earlier_ones_stay(small_disk: Path) -> None:
    spec = job("ddp", {"width": 3000}, checkpoint={"every_steps": 2, "keep": 5})
    with raises("checkpoint.no-space", "MB are free", kind=CheckpointError):
        run_ranks(in_background, 2, spec, small_disk)
    names = [path.name for path in (small_disk / "checkpoints").iterdir()]
    assert names
    for name in names:
        read_checkpoint(small_disk / "checkpoints" / name)


def test_without_room_for_a_copy_training_waits(tmp_path: Path) -> None:
    spec = job("ddp", checkpoint={"every_steps": 2, "keep": 9, "staging": 1e-9})
    run_ranks(in_background, 2, spec, tmp_path, None)  # no writer can be made
    assert steps(tmp_path, "checkpoint_saved") == ALL
    assert not list((tmp_path / "checkpoints").glob(".*"))


def save_with_room_on_one_rank(folder: Path) -> None:
    ranks, run = RankInfo.from_env(), RunDir(folder)
    staging = 0.5 if ranks.is_rank_zero else 1e-9
    checkpoints = store.CheckpointStore(run, ranks, Retention(1), staging)
    model = {"w": torch.arange(5.0 * (1 << 20)).reshape(-1, 64)}
    content = contribution({"model": model}, {}, {"step": 1}, ranks.rank, ranks.world_size)
    for step in (1, 2):
        assert checkpoints.save(step, content, {}, wait=False) is not None
    checkpoints.close()
    state, _ = read_checkpoint(run.checkpoint(2))
    assert torch.equal(state["model"]["w"], model["w"])


def test_where_one_rank_has_no_room_all_wait(tmp_path: Path) -> None:
    RunDir(tmp_path).create()
    run_ranks(save_with_room_on_one_rank, 2, tmp_path)


def fit_in_background(folder: Path, *given: Any, **more: Any) -> Any:
    store._SMALL = 0
    return fit(folder, *given, **more)


def test_under_the_loops_of_lightning(tmp_path: Path) -> None:
    sections = {"strategy": "fsdp", "checkpoint": {"every_steps": 2, "keep": 9}}
    once = run_ranks(fit_in_background, 2, tmp_path / "once", "Counting", sections)
    run_ranks(fit_in_background, 2, tmp_path / "cut", "Counting", sections, stop_after=5)
    resumed = run_ranks(fit_in_background, 2, tmp_path / "cut", "Counting", sections)
    assert RunDir(tmp_path / "cut").checkpoint(4).is_dir()
    for name, value in once[0].parameters.items():
        assert torch.equal(resumed[0].parameters[name], value)
