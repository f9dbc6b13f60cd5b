"""`dtrain doctor` asks a real Slurm cluster, and its nodes check themselves in a job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cluster import Cluster
from support.launch import TINY, dtrain, events, the_run
from support.slurm_cluster import TWO


def doctor(cwd: Path, *arguments: str | Path) -> dict[str, Any]:
    done = dtrain("doctor", "--json", "--launcher", "slurm", *arguments, cwd=cwd)
    shown = json.loads(done.stdout)
    assert done.returncode == (shown["status"] == "problem"), done.stderr
    return {each["check"]: each for each in shown["checks"]}


def test_the_cluster_is_asked(slurm: Cluster, tmp_path: Path) -> None:
    alone = doctor(tmp_path)["slurm"]
    assert alone["status"] == "ok"
    assert "4 idle" in alone["fact"]
    found = doctor(tmp_path, "--nodes", "2", "--gpus", "2", TINY)
    assert found["slurm"]["status"] == "ok"
    assert found["task"]["status"] == "ok"
    assert "cores" not in found, "a login node trains nothing"
    assert not slurm.run(["squeue", "-h"]).stdout, "nothing was submitted"
    for arguments, named in (
        (("--nodes", "7"), "--nodes: nodes: 7"),
        (("-p", "no-such-partition"), "no-such-partition"),
    ):
        refused = doctor(tmp_path, *arguments, TINY)["slurm"]
        assert refused["status"] == "problem"
        assert named in refused["fact"]
        assert refused["remedy"]


def test_a_node_that_lacks_the_data_is_named_before_the_training(
    slurm: Cluster, tmp_path: Path
) -> None:
    """The first job trains; then the data of one node are out of sight."""
    job = tmp_path / "job"
    shutil.copytree(TINY.parent, job)
    data = job / "data"
    data.mkdir()
    (data / "train.bin").write_bytes(b"1")
    asked = ("--preflight", *TWO, "--set", "data.paths=[data/train.bin]", job / "job.yaml")
    (tmp_path / "good").mkdir()
    done = dtrain("launch", *asked, cwd=tmp_path / "good")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["check"]: each for each in events(the_run(tmp_path / "good"), "preflight")}
    assert {each["status"] for each in found.values()} <= {"ok", "warning"}
    assert {"data", "shared", "ports", "clock", "names"} <= found.keys()

    slurm.run(["mount", "-t", "tmpfs", "none", str(data)], host="n1")
    (tmp_path / "bad").mkdir()
    try:
        done = dtrain("launch", *asked, "-o", "slurm.nodelist=n[0-1]", cwd=tmp_path / "bad")
    finally:
        slurm.run(["umount", str(data)], host="n1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: node 1 (n1): data: missing: " in done.stdout
    assert "[doctor.data]" in done.stdout
    assert not the_run(tmp_path / "bad").rank_logs(0)
