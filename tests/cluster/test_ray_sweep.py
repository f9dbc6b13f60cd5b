"""`dtrain launch --sweep` on a real Ray cluster: it starts as many runs as it has place for."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support.launch import TINY, dtrain
from support.ray_cluster import RayCluster, on


def test_a_sweep_uses_the_cluster_and_no_more(ray: RayCluster, tmp_path: Path) -> None:
    sizes = (*on(ray), "--nodes", "1", "-o", f"cpus_per_node={ray.cpus}")
    swept = ("--sweep", "seed=1..3", "--run-id", "sweep")
    done = dtrain("launch", *sizes, *swept, TINY, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = len(ray.nodes)
    at_once = [int(number) for number in re.findall(r"started; (\d+) running", done.stdout)]
    assert max(at_once) == min(nodes, 3)
    listed = json.loads(dtrain("status", "sweep", "--json", cwd=tmp_path).stdout)
    assert [row["state"] for row in listed["runs"]] == ["succeeded"] * 3
    assert [row["sweep_values"] for row in listed["runs"]] == [{"seed": n} for n in (1, 2, 3)]
