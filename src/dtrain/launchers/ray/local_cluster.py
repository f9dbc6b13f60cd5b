"""A Ray cluster owned by dtrain on this machine: one raylet for each simulated node.

`python -m dtrain.launchers.ray.local_cluster SPEC` starts it and prints its address. The cluster
ends when the process's standard input closes, that is, for any end of its owner. Every process is
found and ended by pid: `ray stop` would end every Ray of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from dtrain.errors import LaunchError
from dtrain.ports import free_candidate
from dtrain.procs import become_subreaper

_OBJECT_STORE = 78_643_200  # the minimum of Ray; dtrain stores nothing in it
_START_S = 180.0
_UP = b"Ray runtime started"


class LocalCluster:
    """A context that starts a cluster and ends it: `with LocalCluster(…) as address:`."""

    def __init__(self, nodes: int, resources: dict[str, float], *, dashboard: bool = False) -> None:
        """Prepare.

        Args:
            nodes: the number of raylets, each with its own address.
            resources: the resources of each node, by Ray's names.
            dashboard: true to start a dashboard on loopback.
        """
        self._spec = {"nodes": nodes, "resources": resources, "dashboard": dashboard}
        self.folder = Path()
        self.dashboard_url = ""

    def __enter__(self) -> str:
        """Start it, and return the address.

        Raises:
            LaunchError: Ray cannot be started; the message contains its output.
        """
        # short: Ray's sockets are in it, and their paths may have 107 bytes
        self.folder = Path(tempfile.mkdtemp(prefix="dtr-", dir="/tmp"))
        os.environ.update(self._environment())
        command = [
            *(sys.executable, "-P", "-m", __name__),
            json.dumps({**self._spec, "folder": str(self.folder)}),
        ]
        self._manager = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._manager.stdout is not None
        line = self._manager.stdout.readline()
        killed = {"error": "the process that manages it was killed"}
        up: dict[str, Any] = json.loads(line) if line else killed
        if "error" in up:
            self.__exit__()
            raise LaunchError(
                f"a Ray cluster on this machine cannot be started: {up['error']}",
                code="ray.local-cluster-failed",
            )
        self.dashboard_url = up["dashboard"]
        return str(up["address"])

    def __exit__(self, *_: object) -> None:
        """End every process of it, and remove its files."""
        self._manager.communicate()  # closes its input
        self._manager.wait()

    def _environment(self) -> dict[str, str]:
        """Return variables for the cluster and its driver: a new token, and no telemetry."""
        token = self.folder / "token"
        with open(
            os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(secrets.token_hex(32))
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),  # keeps Ray's record of the current cluster separate
        }


def main() -> None:
    """Keep a cluster running until standard input closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the cluster is needed while workers exit cleanly
    become_subreaper()  # for Ray's processes
    spec = json.loads(sys.argv[1])
    try:
        up = _start(spec)
    except LaunchError as error:
        up = {"error": str(error)}
    try:
        print(json.dumps(up), flush=True)
        sys.stdin.read()
    except OSError:
        pass  # the process that started this one is already gone
    finally:
        _end_descendants()
        shutil.rmtree(spec["folder"], ignore_errors=True)


def _end_descendants() -> None:
    """Kill all processes below this one, including those that are started meanwhile."""
    deadline = time.monotonic() + 30
    while below := psutil.Process().children(recursive=True):
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=5)
        with contextlib.suppress(ChildProcessError):  # this process must reap adopted ones
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            return


def _start(spec: dict[str, Any]) -> dict[str, str]:
    host = "127.0.0.2"
    port, client = (free_candidate(host, f"{spec['folder']}/{what}") for what in ("gcs", "client"))
    dashboard = free_candidate("127.0.0.1", spec["folder"]) if spec["dashboard"] else 0
    head = [
        "--head",
        f"--port={port}",
        f"--ray-client-server-port={client}",
        f"--include-dashboard={'true' if dashboard else 'false'}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard or 8265}",
    ]
    address = f"{host}:{port}"
    _start_and_wait(spec, 0, head)
    with ThreadPoolExecutor(spec["nodes"]) as pool:
        others = range(1, spec["nodes"])
        list(pool.map(lambda k: _start_and_wait(spec, k, [f"--address={address}"]), others))
    return {"address": address, "dashboard": f"http://127.0.0.1:{dashboard}" if dashboard else ""}


def _start_and_wait(spec: dict[str, Any], number: int, more: list[str]) -> None:
    """Start a node and wait until it is up. Otherwise raise a `LaunchError` with its last output.

    On a busy machine Ray gives up on its own daemons after 30 s. The start is then tried again.
    """
    for tries_left in (2, 1, 0):
        process, log = _start_node(spec, number, more)
        deadline = time.monotonic() + _START_S
        while _UP not in log.read_bytes():
            if select.select([sys.stdin], [], [], 0.05)[0]:
                raise LaunchError(
                    "the launch that requested it has ended", code="ray.local-cluster-failed"
                )
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"not started within {_START_S:.0f} s: {_last_lines(log)}",
                    code="ray.local-cluster-failed",
                )
            if process.poll() is not None:
                break
        else:
            return
        if not tries_left:
            raise LaunchError(
                f"`ray start` ended: {_last_lines(log)}", code="ray.local-cluster-failed"
            )


def _start_node(
    spec: dict[str, Any], number: int, more: list[str]
) -> tuple[subprocess.Popen[bytes], Path]:
    """Run `ray start` for one node. Return its process and its log."""
    folder = Path(spec["folder"])
    log = folder / f"node-{number}.log"
    own = Path(tempfile.mkdtemp(prefix=f"t{number}-", dir=folder))  # new for every try
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*ray_start(f"127.0.0.{number + 2}", own, spec["resources"]), *more],
            env={**os.environ, **_node_gpus(number, int(spec["resources"].get("GPU", 0)))},
            cwd=own,  # Ray's processes import from the directory that they are started in
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    return process, log


def ray_start(address: str, folder: Path, resources: dict[str, float]) -> list[str]:
    """Return the command of a node on a shared machine: no port and no file is shared."""
    named = {"CPU": "--num-cpus", "GPU": "--num-gpus", "memory": "--memory"}
    custom = {name: value for name, value in resources.items() if name not in named}
    return [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"),
        "--disable-usage-stats",
        f"--node-ip-address={address}",
        *(f"{flag}={resources[name]:g}" for name, flag in named.items() if name in resources),
        *([f"--resources={json.dumps(custom)}"] if custom else []),
        f"--object-store-memory={_OBJECT_STORE}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--include-log-monitor=false",  # one process per node; the driver reads no logs
        f"--temp-dir={folder}",
    ]


def _node_gpus(number: int, count: int) -> dict[str, str]:
    """Return the GPUs of a node. Nodes that share a machine must not share its GPUs."""
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(k) for k in range((number + 1) * count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[number * count : (number + 1) * count])}


def _last_lines(log: Path) -> str:
    """Return the last lines of output of a Ray node."""
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return " ".join([line for line in lines if line][-3:])


if __name__ == "__main__":
    main()
