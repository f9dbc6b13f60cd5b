"""Launcher `slurm` on nodes that differ: CPUs, GPUs, features and names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster, needs
from support.launch import SLOW, TINY, dtrain, events, metrics, started, the_run, wait_for_step
from support.slurm_cluster import job_of, needs_slurm

UNLIKE = (
    "thin-9 CPUs=2 RealMemory=1024 Feature=slow",
    "gpu-a01 CPUs=8 RealMemory=4096 Gres=gpu:4 Feature=a100,big",
    "fat3 CPUs=4 RealMemory=2048 Gres=gpu:2 Feature=a100",
)


@pytest.fixture(scope="module")
def motley() -> Iterator[Cluster]:
    needs_slurm()
    if needs.choose_mode("auto") == "ports":
        pytest.skip("needs nodes with names of their own")
    with Cluster(unlike=UNLIKE) as cluster:
        yield cluster


@pytest.fixture
def place(motley: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where profiles are found."""
    for name, value in motley.outside().items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "launchers"
    folder.mkdir()
    return folder


def profile(place: Path, **options: Any) -> tuple[str, str]:
    """Write a profile; the flags that choose it."""
    content = {"launcher": "slurm", "extends": "slurm", "options": options}
    (place / "site.yaml").write_text(json.dumps(content))
    return ("--launcher", "site")


def test_one_job_on_every_kind_of_node(motley: Cluster, place: Path, tmp_path: Path) -> None:
    """Each gives the same CPUs, and every rank is on the node that its name says."""
    asked = (*profile(place, cpus_per_node=2), "--nodes", "3", "--procs", "2")
    with started(
        "launch", *asked, *SLOW, "--set", f"args.env_to={tmp_path}", TINY, cwd=tmp_path
    ) as process:
        run = wait_for_step(tmp_path, 2)
        shown = motley.run(["scontrol", "show", "job", "--details", job_of(run)]).stdout
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "Nodes=fat3,gpu-a01,thin-9 CPU_IDs=0-1 " in shown
    names = events(run, "attempt_started")[0]["nodes"]
    assert sorted(names) == ["fat3", "gpu-a01", "thin-9"]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(6)]
    assert [env["DTRAIN_NODE_NAME"] for env in ranks] == [name for name in names for _ in "01"]
    assert [env["LOCAL_RANK"] for env in ranks] == ["0", "1"] * 3
    assert {env["OMP_NUM_THREADS"] for env in ranks} == {"1"}
    (head,) = {env["MASTER_ADDR"] for env in ranks}
    assert head == motley.run(["hostname", "-I"], host=names[0]).stdout.strip()
    assert len(metrics(run)) == 60


def test_nodes_are_chosen_by_feature_and_gpus(motley: Cluster, place: Path, tmp_path: Path) -> None:
    """Four CPUs for two processes; and what no node has is refused with its place."""
    request = profile(place, constraint="a100", gres="gpu:2", cpus_per_node=4)
    seen = ("--set", f"args.env_to={tmp_path}")
    done = dtrain("launch", *request, "--nodes", "2", "--procs", "2", *seen, TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (started,) = events(the_run(tmp_path), "attempt_started")
    assert sorted(started["nodes"]) == ["fat3", "gpu-a01"]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert {env["OMP_NUM_THREADS"] for env in ranks} == {"2"}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in ranks} == {"0,1"}
    for options, nodes, reason, named in (
        ({"constraint": "h100"}, 1, "Invalid feature specification", "constraint: h100"),
        ({"constraint": "a100"}, 3, "configuration is not available", "--nodes: nodes: 3"),
        ({"cpus_per_node": 4}, 3, "configuration is not available", "cpus_per_node: 4"),
    ):
        asked = (*profile(place, **options), "--nodes", str(nodes))
        done = dtrain("launch", *asked, TINY, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert reason in done.stdout + done.stderr
        assert named in done.stdout + done.stderr
