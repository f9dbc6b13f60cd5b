"""`dtrain doctor` asks a real Ray cluster, and its nodes check themselves in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.launch import TINY, dtrain, events, the_run
from support.ray_cluster import RayCluster, on


def doctor(cwd: Path, *arguments: str | Path) -> dict[str, Any]:
    done = dtrain("doctor", "--json", *arguments, TINY, cwd=cwd)
    shown = json.loads(done.stdout)
    assert done.returncode == (shown["status"] == "problem"), done.stderr
    return {each["check"]: each for each in shown["checks"]}


def test_the_cluster_is_asked(ray: RayCluster, tmp_path: Path) -> None:
    found = doctor(tmp_path, *on(ray))["ray"]
    assert found["status"] == "ok"
    assert found["fact"].startswith(f"2 nodes at {ray.address}; asked for: 2 nodes with 2 CPU each")
    short = doctor(tmp_path, *on(ray, "3"))["ray"]
    assert (short["status"], "2 of the cluster's 2 nodes fit" in short["fact"]) == ("problem", True)
    job = ("--launcher", "ray", "-o", "submit=job", "--address", ray.dashboard)
    assert doctor(tmp_path, *job)["ray"]["status"] == "ok"


def test_its_nodes_check_one_another(ray: RayCluster, tmp_path: Path) -> None:
    done = dtrain("launch", "--preflight", *on(ray, procs=1), TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["check"]: each for each in events(the_run(tmp_path), "preflight")}
    assert {"shared", "ports", "clock", "code"} <= found.keys()
    assert {each["status"] for each in found.values()} <= {"ok", "warning"}
