"""How long one waits for the first step on a Ray cluster that runs already.

`dtrain launch --launcher ray` beside the same training by hand with Ray Train's TorchTrainer, and
beside `ray job submit` of a torchrun line; in turns, so that a busy moment hits all::

    python benchmarks/ray.py --rounds 5

Starts a cluster of two raylets on this machine and ends it. All train examples/digits on 4 ranks:
dtrain and Ray Train on 2 nodes of 2, torchrun on one node, as its line says nothing of others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
from launches import BIN, BY_HAND, ENDLESS, JOB, RANKS, first_on_all, parse_steps, read_json
from startup import beside, running, scratch, wait_for, wait_for_idle

from dtrain.launchers.ray.local_cluster import OwnCluster

NODES = 2


class Way(Protocol):
    """One way to launch: its command, and when its first step was done."""

    argv: list[str]

    def first_step(self) -> float | None:
        """Seconds since the epoch; None while there was none."""

    def stop(self) -> None:
        """What killing the command does not end."""


class Dtrain:
    """`dtrain launch --launcher ray --nodes 2 --procs 2`."""

    def __init__(self, folder: Path, address: str, _dashboard: str) -> None:
        self._metrics = folder / "runs" / "bench" / "metrics.jsonl"
        self.argv = [str(BIN / "dtrain"), "launch", "--launcher", "ray", "--address", address]
        self.argv += ["--nodes", str(NODES), "--procs", str(RANKS // NODES), "--run-id", "bench"]
        self.argv += ["--set", f"train.epochs={ENDLESS}", "--set", "log.every_steps=1", str(JOB)]

    def first_step(self) -> float | None:
        return next((line["time"] for line in read_json(self._metrics)), None)

    def stop(self) -> None:
        """Nothing: all of it ends with the command."""


class Trainer:
    """by_hand/digits_ray.py."""

    def __init__(self, folder: Path, address: str, _dashboard: str) -> None:
        self._steps = folder / "steps.txt"
        self.argv = [sys.executable, str(BY_HAND.with_name("digits_ray.py"))]
        self.argv += ["--address", address, "--workers", str(RANKS), "--steps", str(ENDLESS)]
        self.argv += ["--folder", str(folder)]

    def first_step(self) -> float | None:
        steps = parse_steps(self._steps.read_text()) if self._steps.exists() else []
        return first_on_all(steps, RANKS, frozenset())

    def stop(self) -> None:
        """Nothing: its actors end with the command."""


class Submitted(Trainer):
    """`ray job submit -- torchrun by_hand/digits.py`."""

    def __init__(self, folder: Path, address: str, dashboard: str) -> None:
        super().__init__(folder, address, dashboard)
        self._where = ["--address", dashboard]
        self.argv = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *self._where]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.argv += ["--submission-id", folder.name, "--", *torchrun]
        self.argv += [f"--nproc-per-node={RANKS}", str(BY_HAND), "--steps", str(ENDLESS)]
        self.argv += ["--snapshot", str(folder / "snapshot.pt"), "--steps-file", str(self._steps)]
        self._folder = folder

    def stop(self) -> None:
        """The job goes on without the command."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", *self._where]
        subprocess.run([*command, self._folder.name], check=True, stdout=subprocess.DEVNULL)


WAYS: dict[str, Callable[[Path, str, str], Way]] = {
    "dtrain": Dtrain,
    "TorchTrainer": Trainer,
    "ray job submit": Submitted,
}


def seconds(make: Callable[[Path, str, str], Way], address: str, dashboard: str) -> float:
    """Command → first step on all ranks, of one launch."""
    with scratch() as folder:
        way = make(folder, address, dashboard)
        try:
            with running(way.argv, folder, {"OMP_NUM_THREADS": "1"}) as started:
                return wait_for(way.first_step, f"{way.argv}: the first step") - started
        finally:
            way.stop()
            wait_for(lambda: not trainers(folder), "the end of its ranks")


def trainers(folder: Path) -> list[int]:
    """Processes that still work for a launch: its directory is in their command, or in a file."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words or "RayTrainWorker" in words:
            found.append(process.pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up on a Ray cluster, three ways.")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turns")
    idle = "begin each measurement only when the CPU is idle to so much"
    parser.add_argument("--idle", type=float, default=0, metavar="PERCENT", help=idle)
    given = parser.parse_args()
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    cluster = OwnCluster(NODES, {"CPU": RANKS}, dashboard=True)
    with cluster as address:
        for number in range(1, given.rounds + 1):
            for name, make in WAYS.items():
                wait_for_idle(given.idle)
                took[name].append(seconds(make, address, cluster.dashboard_url))
                load = os.getloadavg()[0]
                print(
                    f"round {number}: {name:<14} {took[name][-1]:6.2f} s, load {load:.1f}",
                    flush=True,
                )
    print("\n" + beside(f"command → first step, {RANKS} ranks", took))


if __name__ == "__main__":
    main()
