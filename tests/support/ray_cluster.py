"""A real Ray cluster of several raylets on this machine, for tests; each node ends by its pid."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

from dtrain.launchers.ray.local_cluster import ray_start
from dtrain.ports import free_candidate
from support.launch import until

WANTING = "for want of Ray"
_UP = b"Ray runtime started"


def needs_ray() -> None:
    """Skip where it is not installed, saying how to get it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip(f"{WANTING}: pip install 'dtrain[ray]'")


class RayCluster:
    """Nodes with addresses of their own; the first is the head."""

    def __init__(self, nodes: int, cpus: int, *, first: int = 10, token: bool = True) -> None:
        """Prepare.

        Args:
            nodes: how many to start with.
            cpus: of each.
            first: last number of the head's address on loopback.
            token: whether it asks for one.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="dtr-", dir="/tmp"))
        self.cpus, self._count, self._first = cpus, nodes, first
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._port = free_candidate(self.ip(0), f"{self.folder}/gcs")
        self._dashboard = free_candidate("127.0.0.1", f"{self.folder}/dashboard")
        (self.folder / "token").write_text("b" * 64)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        self.env = {
            **(auth if token else {"RAY_AUTH_MODE": "disabled"}),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
            "HOME": str(self.folder),
        }

    def ip(self, number: int) -> str:
        return f"127.0.0.{self._first + number}"

    @property
    def address(self) -> str:
        return f"{self.ip(0)}:{self._port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self._dashboard}"

    def __enter__(self) -> RayCluster:
        try:
            self.start([0])
            self.start(range(1, self._count))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self.nodes):
            self.kill(number)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self, numbers: Sequence[int], *, within: Sequence[str] = (), **resources: float
    ) -> None:
        """Start nodes, and wait until they are up.

        Args:
            numbers: which.
            within: a command to run `ray start` in.
            **resources: besides the CPUs.
        """
        for number in numbers:
            self._spawn(number, within, resources)
        for number in numbers:
            for tries_left in (2, 1, 0):  # on a busy machine Ray gives up on its own daemons
                until(f"node {number}", lambda n=number: self._is_up(n) or self._ended(n), 240)
                if self._is_up(number):
                    break
                assert tries_left, self._log(number).read_text(errors="replace")[-2000:]
                self.kill(number)
                self._spawn(number, within, resources)

    def _spawn(self, number: int, within: Sequence[str], resources: dict[str, float]) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"t{number}-", dir=self.folder))
        command = ray_start(self.ip(number), folder, {"CPU": self.cpus, **resources})
        command += self._as_head() if number == 0 else [f"--address={self.address}"]
        with self._log(number).open("wb") as log:
            self.nodes[number] = subprocess.Popen(
                [*within, *command], env={**os.environ, **self.env}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _is_up(self, number: int) -> bool:
        return _UP in self._log(number).read_bytes()

    def _ended(self, number: int) -> bool:
        return self.nodes[number].poll() is not None

    def _as_head(self) -> list[str]:
        return [
            "--head",
            f"--port={self._port}",
            f"--ray-client-server-port={free_candidate(self.ip(0), f'{self.folder}/client')}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard}",
        ]

    def _log(self, number: int) -> Path:
        return self.folder / f"node-{number}.log"

    def processes(self, number: int) -> list[psutil.Process]:
        """Every process of a node, workers too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.nodes[number].pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def kill(self, number: int) -> None:
        """A host that loses power: all of its processes end at once."""
        below = self.processes(number)
        process = self.nodes.pop(number)
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(20)
        psutil.wait_procs(below, timeout=20)

    def trainers(self) -> list[psutil.Process]:
        """Processes of ours on any node."""
        found = []
        for number in list(self.nodes):
            for process in self.processes(number):
                with contextlib.suppress(psutil.Error):
                    if "dtrain.node" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def api(self, path: str) -> Any:
        """What the dashboard says."""
        token = (self.folder / "token").read_text()
        request = Request(self.dashboard + path, headers={"Authorization": f"Bearer {token}"})
        with urlopen(request, timeout=20) as answer:
            return json.load(answer)


def on(cluster: RayCluster, nodes: str = "2", procs: int = 2) -> tuple[str, ...]:
    where = ("--launcher", "ray", "--address", cluster.address)
    return (*where, "--nodes", nodes, "--procs", str(procs))
