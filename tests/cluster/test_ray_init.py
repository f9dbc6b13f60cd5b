"""`dtrain init` finds a real Ray cluster, and what it writes is launched there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from support.launch import dtrain, status, the_run
from support.ray_cluster import RayCluster


def test_a_first_task_on_the_cluster_that_was_found(
    ray: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.address)
    done = dtrain("init", "--nodes", "2", "--procs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Ray cluster at {ray.address}: 2 nodes, 4 cores each" in done.stdout
    profile = yaml.safe_load((tmp_path / "launchers" / "ray.yaml").read_text())
    assert profile["options"] == {"address": ray.address}
    command = done.stdout.splitlines()[-1].partition("#")[0].split()
    assert command[1:] == ["launch", "--launcher", "ray", "job.yaml"]
    launched = dtrain(*command[1:], cwd=tmp_path)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert status(the_run(tmp_path))["state"] == "succeeded"
