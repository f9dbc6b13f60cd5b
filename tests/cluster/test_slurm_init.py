"""`dtrain init` finds a real Slurm cluster, and what it writes is launched there."""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster import Cluster
from support.launch import dtrain, status, the_run


def test_a_first_task_on_the_cluster_that_was_found(slurm: Cluster, tmp_path: Path) -> None:
    done = dtrain("init", "--nodes", "2", "--gpus", "0", "work", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 nodes" in done.stdout
    profile = yaml.safe_load((tmp_path / "work" / "launchers" / "slurm.yaml").read_text())
    names = slurm.run(["sinfo", "--noheader", "--format=%R"]).stdout.split()
    assert profile["options"]["partition"] in names
    command = done.stdout.splitlines()[-1].partition("#")[0].split()
    assert command[1:] == ["launch", "--launcher", "slurm", "work/job.yaml"]
    launched = dtrain(*command[1:], cwd=tmp_path)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    run = the_run(tmp_path)
    assert status(run)["state"] == "succeeded"
    assert {path.name for path in (run.path / "attempts" / "0").glob("node-*")} == {
        "node-0",
        "node-1",
    }
