"""How many runs of a sweep find place on a machine and on a Ray cluster, and what each has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dtrain.doctor import gpus
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.ray import cluster
from dtrain.launchers.ray.placement import NodeView
from dtrain.planning import Request, plan_run
from support import JOBS

TINY = str(JOBS / "tiny" / "job.yaml")
CORES = len(os.sched_getaffinity(0))


def plan_of(tmp_path: Path, launcher: str = "local", **launch: Any) -> LaunchPlan:
    overrides = [f"launch.{name}={value}" for name, value in launch.items()]
    return plan_run(TINY, Request(launcher, str(tmp_path), overrides=overrides)).plan


def test_each_process_has_a_core(tmp_path: Path) -> None:
    one, all_cores = plan_of(tmp_path), plan_of(tmp_path, procs_per_node=CORES)
    launcher = LocalLauncher()
    assert [slot.cores for slot in launcher.slots(one, 100, None)] == [1] * CORES
    assert [slot.cores for slot in launcher.slots(one, 1, None)] == [CORES]
    assert len(launcher.slots(all_cores, 100, None)) == 1
    assert len(launcher.slots(plan_of(tmp_path, nodes=CORES), 100, None)) == 1
    assert len(launcher.slots(one, 100, 3 * CORES)) == 3 * CORES
    assert len(launcher.slots(one, 2, 3 * CORES)) == 2


@pytest.mark.parametrize(
    ("size", "visible", "count", "groups"),
    [
        (2, None, 4, ["0,1", "2,3"]),
        (2, None, 5, ["0,1", "2,3"]),
        (1, "3, 1", 4, ["3", "1"]),
        (1, "GPU-a,GPU-b", None, ["GPU-a", "GPU-b"]),
        (4, None, 2, [None]),
        (1, None, 0, [None]),
    ],
)
def test_gpus_in_groups(
    size: int, visible: str | None, count: int | None, groups: list[str | None]
) -> None:
    environ = {} if visible is None else {gpus.VISIBLE: visible}
    assert gpus.split(size, environ, count) == groups


def node(number: int, **total: float) -> NodeView:
    return NodeView(f"id{number}", f"n{number}", f"10.0.0.{number}", 1, total, {}, {})


@pytest.mark.parametrize(
    ("procs", "nodes", "runs", "found"),
    [
        (1, 1, 100, 12),
        (1, 1, 5, 5),
        (4, 1, 100, 3),
        (4, 2, 100, 1),
        (2, 2, 100, 2),
        (1, 3, 100, 0),
        (16, 1, 100, 0),
    ],
)
def test_what_a_ray_cluster_has_place_for(
    tmp_path: Path, procs: int, nodes: int, runs: int, found: int
) -> None:
    """A node of 8 CPUs and one of 4. The nodes of one run are on different nodes."""
    plan = plan_of(tmp_path, "ray", procs_per_node=procs, nodes=nodes)
    views = [node(1, CPU=8.0), node(2, CPU=4.0)]
    assert cluster.most_at_once(plan, views, runs) == found
