"""However a run on a Ray cluster is ended, nothing of it is left, and it can go on."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from random import Random

import psutil

from dtrain.run.rundir import RunDir
from support.errors import assert_named
from support.launch import (
    OFTEN,
    SLOW,
    TINY,
    command_of,
    descendants,
    dtrain,
    events,
    started,
    status,
    the_run,
    until,
    wait_for_step,
)
from support.ray_cluster import RayCluster, needs_ray, on


def driver_of(process: subprocess.Popen[str]) -> psutil.Process:
    (driver,) = [p for p in descendants(process.pid) if "ray.driver" in command_of(p)]
    return driver


def resumes_to(cwd: Path, expected: str) -> RunDir:
    done = dtrain("resume", "last", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(cwd)
    assert status(run)["parameters_sha256"] == expected
    return run


def test_ctrl_c_ends_it_on_the_cluster_in_order(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    with started("launch", *on(ray), *SLOW, TINY, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 3)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "dtrain resume " in output
    assert not ray.trainers()
    (saved,) = events(the_run(tmp_path), "checkpoint_saved")  # they left in order
    run = resumes_to(tmp_path, unbroken)
    assert [event["step"] for event in events(run, "resumed")] == [saved["step"]]


def test_a_killed_command_takes_everything_with_it(
    ray: RayCluster, tmp_path: Path, unbroken: str
) -> None:
    with started("launch", *on(ray), *SLOW, *OFTEN, TINY, cwd=tmp_path) as process:
        wait_for_step(tmp_path, Random().randint(3, 30))
        assert len(ray.trainers()) >= 2
        process.kill()
        process.communicate(timeout=120)
        until("no process of ours on any node", lambda: not ray.trainers(), 10)
    assert status(the_run(tmp_path))["state"] == "lost"
    resumes_to(tmp_path, unbroken)


def test_a_killed_driver_is_reported(ray: RayCluster, tmp_path: Path, unbroken: str) -> None:
    with started("launch", *on(ray), *SLOW, *OFTEN, TINY, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 5)
        driver_of(process).kill()
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 137, output
    assert_named(output, ["driver", "SIGKILL"])
    until("no process of ours on any node", lambda: not ray.trainers(), 10)
    resumes_to(tmp_path, unbroken)


def test_a_lost_head_is_reported(tmp_path: Path) -> None:
    needs_ray()
    with RayCluster(2, 2, first=60) as cluster:
        env = {name: value for name, value in cluster.env.items() if name != "HOME"}
        where = (*on(cluster), "-o", "lost_after=8")  # until then Ray keeps a core busy
        with started("launch", *where, *SLOW, *OFTEN, TINY, cwd=tmp_path, env=env) as process:
            wait_for_step(tmp_path, 5)
            cluster.kill(0)
            output = process.communicate(timeout=55)[0]  # Ray itself takes 60 s to say so
        assert process.returncode == 1, output
        head = f"FAILED: node 0 (the cluster at {cluster.address}): "
        assert_named(output, [head, "[failure.node-lost]"])
        until("no process of ours on any node", lambda: not cluster.trainers(), 60)


def test_a_cluster_of_its_own_goes_with_the_run_and_leaves_others_alone(
    ray: RayCluster, tmp_path: Path
) -> None:
    """Two clusters and two launches on one host at the same time."""
    here, there = tmp_path / "own", tmp_path / "other"
    here.mkdir(), there.mkdir()
    own = ("--launcher", "ray", "--nodes", "2", "--procs", "2", "-o", "dashboard=true")
    with (
        started("launch", *own, TINY, cwd=here) as mine,
        started("launch", *on(ray), TINY, cwd=there) as theirs,
    ):
        until("its raylets", lambda: len(raylets(mine)) == 2, 240)
        folder = Path(raylets(mine)[0].environ()["RAY_TMPDIR"])
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
        assert {p.environ()["RAY_AUTH_MODE"] for p in raylets(mine)} == {"token"}
        assert {p.environ()["RAY_USAGE_STATS_ENABLED"] for p in raylets(mine)} == {"0"}
        below = descendants(mine.pid)
        outputs = [process.communicate(timeout=180)[0] for process in (mine, theirs)]
        assert (mine.returncode, theirs.returncode) == (0, 0), outputs
    assert "Ray's dashboard: http://127.0.0.1:" in outputs[0]
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()
    assert len(json.dumps(ray.api("/api/version"))) > 10  # the other cluster still answers
    shas = {status(the_run(cwd))["parameters_sha256"] for cwd in (here, there)}
    assert len(shas) == 1


def test_a_command_killed_while_its_cluster_starts_leaves_nothing(tmp_path: Path) -> None:
    needs_ray()
    with started("launch", "--launcher", "ray", TINY, cwd=tmp_path) as process:
        until("a node that starts", lambda: starting(process), 60)
        (keeper,) = [p for p in descendants(process.pid) if "local_cluster" in command_of(p)]
        folder = Path(json.loads(keeper.cmdline()[-1])["folder"])
        assert folder.is_dir()
    until("its directory to be gone", lambda: not folder.exists(), 20)


def starting(process: subprocess.Popen[str]) -> bool:
    return any("ray.scripts.scripts" in command_of(p) for p in descendants(process.pid))


def raylets(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for one in descendants(process.pid):
        try:
            if one.name() == "raylet":
                found.append(one)
        except psutil.NoSuchProcess:
            continue
    return found
