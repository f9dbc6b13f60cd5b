"""What cannot be launched on a Ray cluster is stderr before it starts, in one message each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import dtrain as package
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
    stderr = refused(tmp_path, "--launcher", "ray", "--address", "127.0.0.1:9")
    assert "no Ray cluster answers at 127.0.0.1:9" in stderr
    stderr = refused(tmp_path, "--launcher", "ray", "--address", ray.dashboard)
    assert "is not HOST:PORT of the cluster's head" in stderr
    job = ("--launcher", "ray", "-o", "submit=job", "--address", "http://127.0.0.1:9")
    assert "no Ray job server answers at http://127.0.0.1:9" in refused(tmp_path, *job)


def test_a_wrong_token(ray: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("c" * 64)
    stderr = refused(tmp_path, *on(ray), RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert "refuses the connection" in stderr
    assert "RAY_AUTH_TOKEN_PATH" in stderr


def test_more_than_the_cluster_has(ray: RayCluster, tmp_path: Path) -> None:
    stderr = refused(tmp_path, *on(ray), "--gpus", "4", "--procs", "4")
    assert "cannot be placed: requested: 2 nodes with 4 CPU, 4 GPU each; 0 of the" in stderr
    for number in (0, 1):
        where = f"{ray.ip(number)} ({ray.ip(number)})"
        assert f"{where}: free 4 of 4 CPU; 4 GPU missing" in stderr
    stderr = refused(tmp_path, *on(ray, "3"))
    assert "requested: 3 nodes with 2 CPU each; 2 of the cluster's 2 nodes fit" in stderr
    stderr = refused(tmp_path, *on(ray), "-o", "labels={zone: a}")
    assert "label zone is missing" in stderr


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
    assert "waiting for nodes for 2 s: requested: 2 nodes with 4 CPU each; 1 of" in done.stdout
    assert "not placed within 4 s (place_timeout)" in done.stderr
    assert "free 0 of 4 CPU; 4 CPU missing" in done.stderr


def test_a_node_without_the_package(ray: RayCluster, tmp_path: Path) -> None:
    ray.start([5], within=without(SOURCE), gear=1)
    stderr = refused(tmp_path, *on(ray, "1"), *GEAR)
    assert "nodes cannot train; install it there" in stderr
    assert f"{ray.ip(5)}: " in stderr
    assert "has no dtrain" in stderr


def test_nodes_that_do_not_share_the_run_directory(ray: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    ray.start([6], within=without(tmp_path), gear=1)
    stderr = refused(tmp_path, *on(ray, "1"), *GEAR)
    assert "nodes do not share the run directory" in stderr
    assert f"{ray.ip(6)} does not see it" in stderr
    assert "--runs DIR" in stderr


def test_a_folder_too_large_to_travel(ray: RayCluster, tmp_path: Path) -> None:
    for path in TINY.parent.iterdir():
        if path.is_file():
            shutil.copy2(path, tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(3 << 20))
    job = ("--launcher", "ray", "--address", ray.dashboard, "-o", "submit=job")
    stderr = refused(tmp_path, *job, "-o", "upload_limit=1MiB", job=tmp_path / "job.yaml")
    assert "more than is sent to Ray's nodes (upload_limit: 1.0 MiB)" in stderr
    assert "weights.bin (3.0 MiB)" in stderr
