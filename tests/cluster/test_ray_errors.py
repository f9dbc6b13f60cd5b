"""What cannot be launched on a Ray cluster is stderr before it starts, in one message each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import dtrain as package
from support.errors import assert_named, assert_shown
from support.launch import TINY, dtrain, started, until
from support.ray_cluster import RayCluster, on

SOURCE = Path(package.__file__).parents[1]
GEAR = ("-o", "resources={gear: 1}")


def refused(cwd: Path, *arguments: str | Path, job: Path = TINY, **env: str) -> str:
    """Return the stderr of a launch that must fail."""
    done = dtrain("launch", *arguments, job, cwd=cwd, env=env)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr, done.stdout
    return done.stderr


def without(folder: Path) -> Sequence[str]:
    """A command to run another in that sees nothing in a directory: another host's view."""
    if os.geteuid() != 0:
        pytest.skip("hiding a directory from a node needs root")
    hide = f'mount -t tmpfs tmpfs {folder} && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", hide, "sh")


def test_a_wrong_address(ray: RayCluster, tmp_path: Path) -> None:
    error = refused(tmp_path, "--launcher", "ray", "--address", "127.0.0.1:9")
    assert_shown(error, "ray.no-cluster", "127.0.0.1:9")
    error = refused(tmp_path, "--launcher", "ray", "--address", ray.dashboard)
    assert_shown(error, "option.conflict", ray.dashboard, "HOST:PORT")
    job = ("--launcher", "ray", "-o", "submit=job", "--address", "http://127.0.0.1:9")
    assert_shown(refused(tmp_path, *job), "ray.no-job-server", "http://127.0.0.1:9")


def test_a_wrong_token(ray: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("c" * 64)
    error = refused(tmp_path, *on(ray), RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert_shown(error, "ray.not-allowed", "RAY_AUTH_TOKEN_PATH")


def test_more_than_the_cluster_has(ray: RayCluster, tmp_path: Path) -> None:
    code = "ray.too-few-resources"
    error = refused(tmp_path, *on(ray), "--gpus", "4", "--procs", "4")
    assert_shown(error, code, "2 nodes with 4 CPU, 4 GPU each; 0 of ")
    for number in (0, 1):
        where = f"{ray.ip(number)} ({ray.ip(number)})"
        assert_named(error, [f"{where}: free 4 of 4 CPU; 4 GPU missing"])
    error = refused(tmp_path, *on(ray, "3"))
    assert_shown(error, code, "3 nodes with 2 CPU each; 2 of ")
    error = refused(tmp_path, *on(ray), "-o", "labels={zone: a}")
    assert_shown(error, code, "label zone ")


def test_what_is_taken_is_waited_for(ray: RayCluster, tmp_path: Path) -> None:
    """All CPUs of a node are one run's; another waits, shows it, and then gives up."""
    holder, waiter = tmp_path / "holder", tmp_path / "waiter"
    holder.mkdir(), waiter.mkdir()
    slow = ("--set", "args.pause=0.2", "--set", "train.steps=400")
    with started("launch", *on(ray, "1", 4), *slow, TINY, cwd=holder) as process:
        until("it to run", lambda: ray.trainers(), 60)
        short = ("-o", "place_timeout=4s")
        done = dtrain("launch", *on(ray, "2", 4), *short, TINY, cwd=waiter)
        process.terminate()
        process.communicate(timeout=60)
    assert done.returncode == 2
    assert_named(done.stdout, ["waiting for nodes ", "2 nodes with 4 CPU each; 1 of "])
    names = (" 4 s (place_timeout)", "free 0 of 4 CPU; 4 CPU missing")
    assert_shown(done.stderr, "ray.too-few-resources", *names)


def test_a_node_without_the_package(ray: RayCluster, tmp_path: Path) -> None:
    ray.start([5], within=without(SOURCE), gear=1)
    error = refused(tmp_path, *on(ray, "1"), *GEAR)
    assert_shown(error, "ray.node-unsuitable", f"{ray.ip(5)}: ", "no dtrain")


def test_nodes_that_do_not_share_the_run_directory(ray: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    ray.start([6], within=without(tmp_path), gear=1)
    error = refused(tmp_path, *on(ray, "1"), *GEAR)
    assert_shown(error, "ray.node-unsuitable", f"{ray.ip(6)} ", "--runs DIR")


def test_a_directory_too_large_to_travel(ray: RayCluster, tmp_path: Path) -> None:
    for path in TINY.parent.iterdir():
        if path.is_file():
            shutil.copy2(path, tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(3 << 20))
    job = ("--launcher", "ray", "--address", ray.dashboard, "-o", "submit=job")
    error = refused(tmp_path, *job, "-o", "upload_limit=1MiB", job=tmp_path / "job.yaml")
    names = ("upload_limit: 1.0 MiB", "weights.bin (3.0 MiB)")
    assert_shown(error, "ray.code-too-large", *names)
