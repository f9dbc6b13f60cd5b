"""Runs at a URL on nodes that share no directory with one another, nor with who launches."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dtrain.run.phases import read_phases, read_usage
from dtrain.run.remote.runs import staging
from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir, list_runs
from support import warm
from support.launch import OFTEN, SLOW, TINY, dtrain, events, metrics, started, until
from support.ray_cluster import RayCluster, on
from support.s3 import BUCKET, S3, with_bucket

RUNS = f"s3://{BUCKET}/ray"
GEAR = ("-o", "resources={gear: 1}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with with_bucket(tmp_path_factory.mktemp("s3")) as server:
        yield server


def apart(own: Path, *others: Path) -> Sequence[str]:
    """A command that runs another in a directory of its own, where it sees nothing in others."""
    if os.geteuid() != 0:
        pytest.skip("hiding a directory from a node needs root")
    hide = "".join(f"mount -t tmpfs tmpfs {folder} && " for folder in others)
    return ("unshare", "--mount", "sh", "-c", f'{hide}exec env DTRAIN_STAGING={own} "$@"', "sh")


def run_here() -> RunDir:
    (run,) = list_runs(staging(RUNS))
    return run


def has_run(step: int, attempt: int = 0) -> bool:
    runs = list_runs(staging(RUNS))
    begun = runs and any(e["attempt"] == attempt for e in events(runs[0], "training_started"))
    return bool(begun) and any(line["step"] >= step for line in metrics(runs[0]))


def test_nodes_that_share_no_folder_train_are_killed_and_go_on(
    ray: RayCluster, server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: str
) -> None:
    folders = [tmp_path / name for name in ("node-7", "node-8", "here", "elsewhere")]
    for folder in folders:
        folder.mkdir()
    ray.start([7], within=apart(folders[0], folders[1], folders[2]), gear=1)
    ray.start([8], within=apart(folders[1], folders[0], folders[2]), gear=1)
    for name, value in {**server.env, "DTRAIN_STAGING": str(folders[2])}.items():
        monkeypatch.setenv(name, value)
    lacking = dtrain("launch", *on(ray), *GEAR, "--runs", RUNS, TINY, cwd=tmp_path)
    assert lacking.returncode in (1, 2)  # the nodes have no keys
    assert f"  [ray.node-unsuitable]\n  {ray.ip(7)}: " in lacking.stderr
    assert f"{RUNS} " in lacking.stderr
    for path in staging(RUNS).glob("*/resolved.yaml"):
        path.unlink()  # that run is not the one that we look for
    keys = [word for name in server.env for word in ("--env", name)]
    job = Path(shutil.copytree(TINY.parent, tmp_path / "job")) / TINY.name
    launch = ("launch", *on(ray), *GEAR, *keys, "--runs", RUNS)
    with started(*launch, *SLOW, *OFTEN, job, cwd=tmp_path) as process:
        until("step 5", lambda: has_run(5), 240)
        (actor,) = [p for p in ray.processes(8) if p.name().startswith("ray::NodeActor")]
        actor.kill()
        until("the next attempt", lambda: has_run(8, attempt=1), 240)
        process.kill()
        process.communicate(timeout=30)
    until("no process of ours on any node", lambda: not ray.trainers(), 15)
    run = run_here()
    assert events(run, "resumed")[0]["step"] >= 2
    assert {node for node, _ in run.rank_logs(0).values()} == {0, 1}  # what both nodes have told
    assert "killed" in dtrain("why", "--runs", RUNS, "--attempt", "0", cwd=tmp_path).stdout

    monkeypatch.setenv("DTRAIN_STAGING", str(folders[3]))
    shutil.rmtree(job.parent)  # another laptop has no such directory
    quick = ("--set", "checkpoint.every_steps=25", "--set", "args.pause=0")
    done = dtrain("resume", "--runs", RUNS, *keys, *quick, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"parameters sha256 {unbroken}" in done.stdout
    assert [line["step"] for line in metrics(run_here())][-1] == 60
    placed = [event["nodes"] for event in events(run_here(), "attempt_started")]
    assert placed == [[ray.ip(7), ray.ip(8)]] * 3
    report = dtrain("report", "--runs", RUNS, "-o", "page.html", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert {rank for rank, _ in read_phases(run_here(), 2)} == {0, 1, 2, 3}
    assert {node_rank for node_rank, _ in read_usage(run_here(), 2)} == {0, 1}
    for folder in folders[:2]:
        assert not list(folder.rglob("model.pt"))  # cleared away, also by those that were killed
    place = RemoteStore(RUNS)
    told = b"".join(place.read(name) or b"" for name in place.files())
    assert server.env["AWS_SECRET_ACCESS_KEY"].encode() not in told


def test_a_ray_job_keeps_its_run_at_a_url(
    ray: RayCluster, server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: str
) -> None:
    """The cluster has keys of its own; the laptop is closed, and another asks."""
    keys = ray.folder / ".aws"
    keys.mkdir()
    lines = [f"{name.lower()} = {value}" for name, value in server.env.items() if "KEY" in name]
    (keys / "credentials").write_text("\n".join(["[default]", *lines, ""]))
    (keys / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n"
    )
    for name, value in {**server.env, "DTRAIN_STAGING": str(tmp_path / "laptop")}.items():
        monkeypatch.setenv(name, value)
    where = ("--launcher", "ray", "--address", ray.dashboard, "-o", "submit=job")
    python = ("-o", f"python={warm.programs() / 'python'}", "--nodes", "2", "--procs", "2")
    url = f"s3://{BUCKET}/jobs"
    sent = dtrain(
        "launch", "--detach", *where, *python, "--runs", url, *SLOW, TINY, cwd=tmp_path, timeout=180
    )
    assert sent.returncode == 0, sent.stderr
    monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path / "another"))
    followed = dtrain("logs", "--follow", "--runs", url, cwd=tmp_path, timeout=240)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "finished: 60 steps" in followed.stdout
    (run,) = list_runs(staging(url))
    assert dtrain("status", "--runs", url, cwd=tmp_path).stdout.count(unbroken) == 1
    names = RemoteStore(url).files()
    assert f"{run.id}/attempts/0/result.json" in names
    assert [name for name in names if name.endswith("/step-00000060/manifest.json")]
    assert not list(ray.folder.glob(".cache/dtrain/runs/*/*"))  # cleared away on the cluster
