"""`dtrain bench` as a job of a real Slurm cluster."""

from __future__ import annotations

import json
from pathlib import Path

from cluster import Cluster
from support.launch import dtrain


def test_the_nodes_of_a_job_are_measured(slurm: Cluster, tmp_path: Path) -> None:
    asked = ("--launcher", "slurm", "--nodes", "3", "--procs", "1", "--only", "links,store")
    done = dtrain("bench", *asked, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measured"]
    assert len(set(found["nodes"])) == 3
    ends = {(each["source"], each["target"]) for each in found["links"]}
    assert ends == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert all(each["bytes_per_s"] > 0 for each in found["links"])
    assert found["store"]["get_s"] > 0
