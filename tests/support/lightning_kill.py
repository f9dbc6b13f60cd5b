"""A LightningModule that is killed in mid-epoch, by any launcher, goes on as if it had not been."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.run.rundir import RunDir
from support import JOBS
from support.launch import (
    dtrain,
    events,
    kill,
    started,
    status,
    the_run,
    wait_for_step,
    worker_pids,
)

JOB = JOBS / "lightning_slow.yaml"
STEPS_PER_EPOCH = 13

WAYS = {
    "dtrain": (),
    "lightning": ("--set", "lightning.step=lightning"),
    "manual": ("--set", "task=lightning_shapes.py:SlowGan"),
    "fsdp": ("--set", "lightning.step=lightning", "--set", "strategy=fsdp"),
}
"""Of stepping, and how a job asks for them."""

in_both_ways = pytest.mark.parametrize("way", ["dtrain", "lightning"])


@functools.cache
def unbroken(way: str) -> str:
    """The digest of what two ranks of this host end with, of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        done = dtrain("launch", "--procs", "2", *WAYS[way], JOB, cwd=Path(folder))
        assert done.returncode == 0, done.stdout + done.stderr
        return str(status(the_run(Path(folder)))["parameters_sha256"])


def killed_in_mid_epoch(
    cwd: Path,
    way: str,
    *arguments: str,
    kill_rank: Callable[[RunDir, int], object] = lambda run, pid: kill(pid),
) -> None:
    """Launch on two ranks, kill one, and see it end as if nothing had been.

    Args:
        cwd: an empty directory.
        way: of stepping.
        arguments: of the launch: where the two ranks are.
        kill_rank: kills the process that is this pid on the node of rank 1.
    """
    with started("launch", *arguments, "--max-restarts", "1", *WAYS[way], JOB, cwd=cwd) as process:
        run = wait_for_step(cwd, STEPS_PER_EPOCH + 4)
        kill_rank(run, worker_pids(run)[1])
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "available: " not in output  # what Lightning says of devices
    (resumed,) = events(run, "resumed")
    assert resumed["step"] % STEPS_PER_EPOCH != 0
    assert bool(events(run, "own_loops")) == (way == "manual")
    assert status(run)["parameters_sha256"] == unbroken(way)
