"""Launcher `ray` on a real cluster: the contract of all launchers, and what only Ray does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dtrain.run.rundir import RunDir
from support import EXAMPLES
from support.contract import LauncherContract, Started, Way
from support.errors import assert_named
from support.launch import (
    DIGITS,
    OFTEN,
    SLOW,
    TINY,
    dtrain,
    events,
    kill,
    recorded,
    started,
    status,
    the_run,
    until,
    wait_for_step,
    worker_pids,
)
from support.lightning_kill import in_both_ways, killed_in_mid_epoch
from support.programs import KINDS, restarts_on, trains_as_one_process
from support.ray_cluster import RayCluster, on


class TestContract(LauncherContract):
    @pytest.fixture
    def way(self, ray: RayCluster) -> Way:
        @contextmanager
        def launch(cwd: Path, *arguments: str, **env: str) -> Iterator[Started]:
            with started("launch", *on(ray), *arguments, TINY, cwd=cwd, env=env) as process:
                yield [process]

        return Way(launch, (ray.ip(0), ray.ip(1)), address=ray.ip(0))


# ---------------------------------------------------------------------- the same training


def test_digits_on_two_nodes_is_the_training_of_one_machine(
    ray: RayCluster, tmp_path: Path
) -> None:
    shorter = ("--set", "train.steps=20")
    here, local = recorded(tmp_path / "a", "--nodes", "2", "--procs", "2", *shorter, DIGITS)
    there, remote = recorded(tmp_path / "b", *on(ray), *shorter, DIGITS)
    assert local.last_step == remote.last_step == 20
    assert [local.ids(step) for step in range(1, 21)] == [remote.ids(s) for s in range(1, 21)]
    assert status(here)["parameters_sha256"] == status(there)["parameters_sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_and_a_program_that_is_not_python(
    ray: RayCluster, tmp_path: Path, kind: str
) -> None:
    restarts_on(on(ray, procs=1), tmp_path, kind)


def test_a_keras_model_with_its_metrics_is_the_same_training(
    ray: RayCluster, tmp_path: Path
) -> None:
    job = EXAMPLES / "keras" / "job.yaml"
    trains_as_one_process(on(ray, procs=1), tmp_path, job, ("loss", "accuracy"))


# ---------------------------------------------------------------------- failures


def trains_through(
    cluster: RayCluster, cwd: Path, disturb: Any, *arguments: str, nodes: str = "2"
) -> tuple[RunDir, str]:
    """The slow job, disturbed at step 5, ends well all the same; what the console said."""
    with started("launch", *on(cluster, nodes), *SLOW, *arguments, TINY, cwd=cwd) as process:
        run = wait_for_step(cwd, 5)
        disturb(run)
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
    assert status(run)["state"] == "succeeded"
    return run, output


def test_a_killed_worker_is_named_and_started_again(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    again = (*OFTEN, "--max-restarts", "1")
    run, output = trains_through(ray, tmp_path, lambda run: kill(worker_pids(run)[3]), *again)
    assert f"rank 3 on {ray.ip(1)} failed: killed by SIGKILL; restart 1 of 1" in output
    assert run.attempts() == [0]
    assert status(run)["parameters_sha256"] == unbroken


@in_both_ways
def test_a_lightning_module_is_killed_and_goes_on(
    ray: RayCluster, tmp_path: Path, way: str
) -> None:
    killed_in_mid_epoch(tmp_path, way, *on(ray, procs=1))


def test_a_killed_actor_is_named_and_the_next_attempt_goes_on(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    def kill_actor(_run: RunDir) -> None:
        (actor,) = [p for p in ray.processes(1) if p.name().startswith("ray::NodeActor")]
        actor.kill()

    run, output = trains_through(ray, tmp_path, kill_actor, *OFTEN)
    assert f"node 1 ({ray.ip(1)}) was lost" in output
    assert run.attempts() == [0, 1]
    why = dtrain("why", "--attempt", "0", cwd=tmp_path).stdout
    assert_named(why, [f"FAILED: node 1 ({ray.ip(1)}): ", "ranks 2-3", "[failure.node-lost]"])
    assert status(run)["parameters_sha256"] == unbroken
    assert events(run, "resumed")[0]["step"] >= 2


def test_a_lost_node_is_replaced_by_one_that_comes(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    """Only nodes with the label count, so those are the two that are ours to break."""
    ray.start([2, 3], gear=1)

    def lose(_run: RunDir) -> None:
        ray.kill(3)
        until("a word on it", lambda: "waiting for nodes" in json.dumps(events(the_run(tmp_path))))
        ray.start([4], gear=1)

    run, output = trains_through(ray, tmp_path, lose, *OFTEN, "-o", "resources={gear: 1}")
    assert f"node 1 ({ray.ip(3)}) was lost; attempt 1 continues from the last" in output
    placed = [event["nodes"] for event in events(run, "attempt_started")]
    assert placed == [[ray.ip(2), ray.ip(3)], [ray.ip(2), ray.ip(4)]]
    assert status(run)["parameters_sha256"] == unbroken


def test_an_elastic_run_goes_on_with_the_nodes_that_remain(ray: RayCluster, tmp_path: Path) -> None:
    ray.start([2, 3], gear=1)
    gear = ("-o", "resources={gear: 1}")
    run, _ = trains_through(ray, tmp_path, lambda run: ray.kill(2), *OFTEN, *gear, nodes="1:2")
    placed = [event["nodes"] for event in events(run, "attempt_started")]
    assert placed == [[ray.ip(2), ray.ip(3)], [ray.ip(3)]]
    assert [line["world_size"] for line in events(run, "training_started")] == [4, 2]
