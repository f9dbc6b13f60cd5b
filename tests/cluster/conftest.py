"""Real clusters for the tests of this directory; they are skipped where Slurm or Ray is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster
from support import warm
from support.launch import SLOW, TINY, dtrain, status, the_run, until
from support.ray_cluster import WANTING as WANTING_RAY
from support.ray_cluster import RayCluster, needs_ray
from support.slurm_cluster import WANTING as WANTING_SLURM
from support.slurm_cluster import needs_slurm


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Four nodes with four GPUs each (pretended), idle, up for the whole session.

    Leave it as it was: all nodes up, no job left. Who breaks nodes starts a cluster of their own.
    """
    needs_slurm()
    with Cluster(nodes=4, gpus_per_node=4) as cluster:
        yield cluster


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory of a user's own profiles; these make nodes warm, see `support.warm`."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "dtrain" / "launchers"
    folder.mkdir(parents=True)
    if not warm.is_cold:
        python = warm.programs() / "python"
        for name in ("slurm", "ray"):
            text = f"launcher: {name}\nextends: {name}\noptions:\n  python: {python}\n"
            (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def slurm(
    slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, profiles: Path
) -> Iterator[Cluster]:
    """The cluster, with its commands on our PATH, and idle again at the end."""
    for name, value in slurm_cluster.outside().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")
    yield slurm_cluster
    slurm_cluster.run(["scancel", "--user", "root"], check=False)
    slurm_cluster.wait_idle()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """Two nodes of four CPUs, up for the whole session; tokens and a dashboard.

    Leave it as it was. A test may add nodes, from number 2 on, and break those.
    """
    needs_ray()
    with RayCluster(nodes=2, cpus=4) as cluster:
        yield cluster


@pytest.fixture
def ray(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, profiles: Path
) -> Iterator[RayCluster]:
    """The cluster, with its token in our environment; nothing of ours is left on any node."""
    for name, value in ray_cluster.env.items():
        if name != "HOME":
            monkeypatch.setenv(name, value)
    yield ray_cluster
    for number in [number for number in ray_cluster.nodes if number > 1]:
        ray_cluster.kill(number)
    until("an empty cluster", lambda: not ray_cluster.trainers())


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The parameters of the slow job when nothing disturbs it."""
    cwd = tmp_path_factory.mktemp("unbroken")
    quick = ("--set", "args.pause=0", "--nodes", "2", "--procs", "2", TINY)
    done = dtrain("launch", *SLOW, *quick, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return str(status(the_run(cwd))["parameters_sha256"])


@pytest.fixture
def breakable(monkeypatch: pytest.MonkeyPatch, profiles: Path) -> Iterator[Cluster]:
    """Three nodes of our own, with a network that can be broken."""
    needs_slurm()
    with Cluster(nodes=3, slurmd_timeout_s=3) as cluster:
        if cluster.spec.mode == "ports":
            pytest.skip("needs nodes with a network of their own")
        for name, value in cluster.outside().items():
            monkeypatch.setenv(name, value)
        yield cluster


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for wanting in (WANTING_SLURM, WANTING_RAY):
        count = sum(wanting in str(report.longrepr) for report in skipped)
        if count:
            terminalreporter.write_line(f"{count} tests skipped {wanting}", yellow=True)
