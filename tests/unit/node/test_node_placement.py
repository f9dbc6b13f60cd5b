"""How a node process finds out who it is: a reader for each kind of cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.launchers import base
from dtrain.node.placement.base import Arguments
from dtrain.node.placement.ray import RayPlacement
from dtrain.run import files
from support.errors import assert_named, raises

READER = """\
from dtrain.errors import LaunchError
from dtrain.node.placement.base import PlacementReader

class Elsewhere(PlacementReader):
    def begin(self, run):
        print("begin", run.id, flush=True)

    def join(self, plan):
        who, told = self.environ["ELSEWHERE_RANK"], self.arguments.placement_args
        raise LaunchError(f"node {who} of {plan.nodes}, told {told}")
"""


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    train = {"epochs": 1, "global_batch_size": 8}
    given = {"name": "digits", "task": "task.py:T", "train": train, "launch": {"nodes": 2}}
    facts = Facts("digits-abc", str(tmp_path), "python3", "laptop", cores=8, free_port=16000)
    made = make_plan(
        JobSpec.model_validate(given),
        job_dir="/job", launcher="local", profile="local", options=AnyOptions(), facts=facts,
    )  # fmt: skip
    made = base.load("local").complete(made, facts)
    files.write_json(made.run.plan, made.to_json())
    return made


def node(plan: LaunchPlan, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "dtrain.node", plan.run_dir, *flags],
        env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_reader_from_outside_is_found_by_its_name(plan: LaunchPlan, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(READER)
    package = tmp_path / "elsewhere-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[dtrain.placements]\nelsewhere = elsewhere:Elsewhere\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "ELSEWHERE_RANK": "1"}
    done = node(plan, "--placement", "elsewhere", "--placement-args", "north", **env)
    assert (done.returncode, done.stdout) == (1, "begin digits-abc\n")
    assert done.stderr == "dtrain: node 1 of 2, told north\n"


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        ((), 2, ["--node-rank"]),
        (("--placement", "mars"), 2, ["'mars'", "argv, slurm, ray"]),
        (("--placement", "slurm"), 1, [f"{os.uname().nodename} ", "run directory"]),
        (("--placement", "ray", "--node-rank", "0"), 2, ["--placement-args: Expecting value"]),
    ],
)
def test_a_process_without_a_placement_ends(
    plan: LaunchPlan, flags: tuple[str, ...], code: int, names: list[str]
) -> None:
    done = node(plan, *flags)
    assert done.returncode == code
    assert done.stderr.startswith("dtrain: ")
    assert_named(done.stderr, names)


def test_a_node_of_ray_is_where_it_was_placed(plan: LaunchPlan) -> None:
    arguments = Arguments()
    arguments.node_rank, arguments.listen_fd = [0], None
    arguments.placement_args = (
        '{"attempt": 3, "node_names": ["a"], "host": "10.0.0.7", "port": 29400}'
    )
    environ = {"HOME": "/root", "RAY_JOB_ID": "1", "RANK": "7"}
    placed = RayPlacement(arguments, environ).join(plan)
    assert (placed.node_ranks, placed.environ) == ([0], {"HOME": "/root"})
    assert (placed.plan.attempt, placed.plan.node_names) == (3, ("a",))
    assert (placed.plan.rdzv_host, placed.plan.rdzv_port) == ("10.0.0.7", 29400)


@pytest.mark.parametrize(
    "wrong", [{"port": 0}, {"port": "29400"}, {"attempt": -1}, {"node_names": "a"}, {"more": 1}]
)
def test_what_ray_says_is_checked(plan: LaunchPlan, wrong: dict[str, Any]) -> None:
    arguments = Arguments()
    said = {"attempt": 0, "node_names": ["a"], "host": "10.0.0.7", "port": 29400, **wrong}
    arguments.placement_args = files.to_json(said)
    with raises("node.invalid-placement", f"--placement-args: {next(iter(wrong))}"):
        RayPlacement(arguments, {}).join(plan)
