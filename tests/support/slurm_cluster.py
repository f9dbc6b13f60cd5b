"""What tests on the Slurm cluster have in common; the fixture `slurm_cluster` is in conftest.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Cluster, missing
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from support.launch import SLOW, TINY, metrics, started, status, wait_for_step

TWO = ("--launcher", "slurm", "--nodes", "2", "--procs", "2")

WANTING = "for want of Slurm"


def needs_slurm(*, accounting: bool = False) -> None:
    """Skip where it is not installed, saying what is missing and how to get it."""
    if reason := missing(accounting=accounting):
        pytest.skip(f"{WANTING}: {reason}")


def submit(cluster: Cluster, *options: str) -> str:
    """sbatch with these options; the job's id."""
    quiet = ["sbatch", "--parsable", "-o", "/dev/null"]
    return cluster.run([*quiet, *options]).stdout.strip()


def job_of(run: RunDir) -> str:
    handle = Handle.read(run)
    assert handle is not None
    return str(handle.job_id)


def sha(run: RunDir) -> str:
    return str(status(run)["parameters_sha256"])


def once(folder: Path) -> tuple[str, ...]:
    """A profile in a directory of ours whose jobs are never requeued; the flags that choose it."""
    place = folder / "launchers"
    place.mkdir()
    (place / "once.yaml").write_text("launcher: slurm\nextends: slurm\noptions:\n  requeue: 0\n")
    return ("--launcher", "once", "--nodes", "1", "--procs", "1")


def by_submitit() -> str:
    """Write a profile of that name; needs the fixture `slurm`, which says where it is found."""
    place = Path(os.environ["XDG_CONFIG_HOME"]) / "dtrain" / "launchers"
    text = "launcher: slurm\nextends: slurm\noptions:\n  submit: submitit\n"
    (place / "by-submitit.yaml").write_text(text)
    return "by-submitit"


def goes_on(
    tmp_path: Path, disturb: Callable[[RunDir], None], *arguments: str, attempts: int | None = 2
) -> tuple[RunDir, str]:
    """Launch the slow job, disturb it at step 5, and see it end well in a later attempt.

    Args:
        attempts: how many it takes; None: two or more.
    """
    with started("launch", *TWO, *SLOW, *arguments, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 5)
        disturb(run)
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
    made = max(2, len(run.attempts())) if attempts is None else attempts
    assert run.attempts() == list(range(made)), output
    now = status(run)
    assert (now["state"], now["attempt"]) == ("succeeded", made - 1)
    assert sorted({line["step"] for line in metrics(run)}) == list(range(1, 61))
    return run, output
