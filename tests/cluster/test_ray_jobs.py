"""The launch as a Ray job: the cluster goes on without us, and shares no disk with us."""

from __future__ import annotations

from pathlib import Path

from support import warm
from support.launch import (
    OFTEN,
    SLOW,
    TINY,
    dtrain,
    metrics,
    started,
    status,
    the_run,
    until,
    wait_for,
)
from support.ray_cluster import RayCluster


def as_job(cluster: RayCluster, runs: Path | None = None) -> tuple[str, ...]:
    where = ("--launcher", "ray", "--address", cluster.dashboard, "-o", "submit=job")
    away = () if runs is None else ("-o", f"cluster_runs={runs}")
    return (
        *where,
        "-o",
        f"python={warm.programs() / 'python'}",
        *away,
        "--nodes",
        "2",
        "--procs",
        "2",
    )


def test_it_goes_on_without_us_and_is_found_again(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    laptop, cluster = tmp_path / "laptop", tmp_path / "cluster"
    laptop.mkdir()
    sent = dtrain("launch", "--detach", *as_job(ray, cluster), *SLOW, TINY, cwd=laptop)
    assert sent.returncode == 0, sent.stderr
    followed = dtrain("logs", "--follow", cwd=laptop, timeout=180)
    assert followed.returncode == 0
    assert "finished: 60 steps" in followed.stdout
    run = the_run(laptop)
    now = status(run)
    assert (now["state"], now["step"], now["parameters_sha256"]) == ("succeeded", 60, unbroken)
    assert f"job {run.id}-0 at {ray.dashboard}: SUCCEEDED" in now["ray"]
    assert not list(run.checkpoints.iterdir())
    assert list((cluster / run.id / "checkpoints").iterdir())
    assert [line["step"] for line in metrics(run)] == list(range(1, 61))


def test_it_is_cancelled_from_afar_and_resumed(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    where = as_job(ray, tmp_path / "cluster")
    slower = (*SLOW, "--set", "args.pause=0.5")  # asking from afar takes seconds
    with started("launch", *where, *slower, *OFTEN, TINY, cwd=laptop) as process:
        assert wait_for(lambda: ray.trainers(), 90)
        run = the_run(laptop)
        assert wait_for(lambda: any(line["step"] > 2 for line in metrics(run)), 90)
        process.kill()  # the laptop is closed
        process.communicate(timeout=10)
        assert status(run)["state"] == "running"
    assert "cancelled" in dtrain("cancel", "last", cwd=laptop).stdout
    until("no process of ours on any node", lambda: not ray.trainers(), 10)
    resumed = dtrain("resume", "--set", "args.pause=0", cwd=laptop, timeout=180)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert status(run)["parameters_sha256"] == unbroken


def test_a_failure_in_a_job_is_named_here(ray: RayCluster, tmp_path: Path) -> None:
    wrong = ("--set", "args.misbehave=exit", "--set", "args.rank=2")
    done = dtrain("launch", *as_job(ray), *wrong, TINY, cwd=tmp_path, timeout=180)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"FAILED: rank 2 on node 1 ({ray.ip(1)}): sys.exit(3)" in done.stdout
