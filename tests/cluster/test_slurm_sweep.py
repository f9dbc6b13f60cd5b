"""`dtrain launch --sweep` on Slurm: the elements of an array, each a run of its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from cluster import Cluster
from dtrain.run.rundir import RunDir
from support.errors import assert_shown
from support.launch import SLOW, TINY, dtrain, events, metrics, started, status, until, wait_for
from support.slurm_cluster import by_submitit, job_of, sha

ONE = ("--launcher", "slurm")
SEEDS = ("--sweep", "seed=1,2,3", "--run-id", "sweep")


@pytest.fixture(params=["sbatch", "submitit"])
def by(slurm: Cluster, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The flags of each way to submit."""
    return ONE if request.param == "sbatch" else ("--launcher", by_submitit())


def runs_of(folder: Path) -> list[RunDir]:
    return [RunDir(folder / "runs" / f"sweep-{index}") for index in range(3)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The parameters of the last two elements when nothing disturbs them."""
    found = []
    for seed in (2, 3):
        cwd = tmp_path_factory.mktemp(f"seed-{seed}")
        more = ("--set", f"seed={seed}", "--set", "args.pause=0", "--run-id", "alone")
        assert dtrain("launch", *SLOW, *more, TINY, cwd=cwd).returncode == 0
        found.append(sha(RunDir(cwd / "runs" / "alone")))
    return found


def reached(run: RunDir, step: int) -> None:
    def at() -> bool:
        return any(line["step"] >= step for line in metrics(run))

    until(f"step {step} of {run.id}", at, 60)


def test_an_element_that_is_requeued_goes_on_alone(
    slurm: Cluster, tmp_path: Path, by: tuple[str, ...], alone: list[str]
) -> None:
    slower = ("--set", "args.pause=0.2")
    with started("launch", *by, *SLOW, *slower, *SEEDS, TINY, cwd=tmp_path) as process:
        still, by_hand, by_itself = runs_of(tmp_path)
        reached(by_hand, 5)
        slurm.run(["scontrol", "requeue", job_of(by_hand)])
        reached(by_itself, 5)  # the last one has the id of the whole array, besides its own
        slurm.run(["scancel", "--signal=USR2", job_of(by_itself)])
        shown = slurm.run(["squeue", "--array", "--noheader", "--format=%F %K %j %k"]).stdout
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    array = job_of(still).removesuffix("_0")
    assert [job_of(run) for run in runs_of(tmp_path)] == [f"{array}_{index}" for index in range(3)]
    assert f"{array} 1 sweep dtrain runs sweep-0 to sweep-2" in shown
    assert [run.attempts() for run in runs_of(tmp_path)] == [[0], [0, 1], [0, 1]]
    assert [sha(by_hand), sha(by_itself)] == alone
    for run in (by_hand, by_itself):
        assert events(run, "training_started")[1]["resumed_from"] >= 5
    for index in range(3):
        assert f"sweep-{index} (seed={index + 1}): succeeded after 60 steps" in output
    assert status(by_hand)["state"] == "succeeded"


def test_one_element_is_cancelled_and_then_all(slurm: Cluster, tmp_path: Path) -> None:
    more = ("--at-once", "1", *SLOW, "--set", "args.pause=0.5")
    with started("launch", *ONE, *more, *SEEDS, TINY, cwd=tmp_path) as process:
        first, second, third = runs_of(tmp_path)
        reached(first, 2)
        assert "waiting for other runs of its array" in status(third)["slurm"]
        assert "cancelled" in dtrain("cancel", second.id, cwd=tmp_path).stdout
        assert (status(first)["state"], status(third)["state"]) == ("running", "running")
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert [status(run)["state"] for run in runs_of(tmp_path)] == ["cancelled"] * 3
    assert events(first, "stopped")  # it saved and left
    assert "sweep-1 (seed=2): cancelled" in output


def test_failed_elements_fail_the_command_and_are_resumed_together(
    slurm: Cluster, tmp_path: Path, by: tuple[str, ...]
) -> None:
    swept = ("--sweep", "seed=1,2", "--sweep", "args.misbehave=raise,null", "--run-id", "sweep")
    done = dtrain("launch", *by, *swept, "--set", "args.rank=0", TINY, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "sweep-2 (seed=2, args.misbehave=raise): failed; dtrain why sweep-2" in done.stdout
    assert "FAILED: rank 0" in dtrain("why", "sweep-2", cwd=tmp_path).stdout
    done = dtrain("resume", "sweep", "--set", "args.misbehave=null", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [RunDir(tmp_path / "runs" / f"sweep-{index}") for index in range(4)]
    assert [status(run)["attempt"] for run in runs] == [1, 0, 1, 0]
    if by == ONE:
        array = job_of(runs[0]).removesuffix("_0")
        assert job_of(runs[2]) == f"{array}_2"
    listed = json.loads(dtrain("status", "sweep", "--json", cwd=tmp_path).stdout)
    assert [row["state"] for row in listed["runs"]] == ["succeeded"] * 4


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (("--sweep", "seed=1,2", "-p", "nowhere"), "slurm.partition-invalid", ["nowhere"]),
        (("--sweep", "launch.nodes=1,2"), "slurm.array-differs", ["--nodes=2", "--nodes=1"]),
        (("--sweep", "seed"), "usage.sweep-syntax", ["--sweep seed: "]),
        (("--sweep", "seed=1,1"), "usage.sweep-repeats", ["seed=1"]),
        (("--sweep", "no.such=1"), "job.unknown-field", ["no"]),
    ],
)
def test_what_cannot_be_an_array_is_refused(
    slurm: Cluster, tmp_path: Path, arguments: tuple[str, ...], code: str, names: list[str]
) -> None:
    done = dtrain("launch", *ONE, *arguments, TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert_shown(done.stderr, code, *names)
    assert "no runs" in dtrain("runs", cwd=tmp_path).stdout


def test_an_array_of_twelve(slurm: Cluster, tmp_path: Path) -> None:
    """As one array; each is held, so that none costs more than its submission."""
    many = ("--sweep", "seed=" + ",".join(map(str, range(12))), "--run-id", "many")
    shown = dtrain("launch", *ONE, *many, "--dry-run", "--at-once", "4", TINY, cwd=tmp_path).stdout
    assert "#SBATCH --array=0-11%4" in shown
    assert "Slurm would accept the job" in shown
    done = dtrain("launch", *ONE, *many, "-o", "slurm.hold", "--detach", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = slurm.run(["squeue", "--array", "--noheader", "--format=%i %j"]).stdout
    assert len([line for line in listed.splitlines() if line.endswith(" many")]) == 12
    assert wait_for(lambda: dtrain("runs", cwd=tmp_path).stdout.count("running") == 12, 20)
