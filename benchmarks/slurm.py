"""How long one waits on Slurm from the command to the first step of the training.

dtrain beside torchrun in a batch script and beside submitit, both as one writes them by hand, in
turns (A B C A B C …) on a real cluster of two nodes that this starts and ends::

    python benchmarks/slurm.py --rounds 5

All train examples/digits on 2 nodes with 2 ranks each. Needed: Slurm (slurm/cluster/install.sh),
and root, so that each node has an address of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launches import BIN, BY_HAND, ENDLESS, JOB, ROOT, first_on_all, parse_steps, read_json
from startup import beside, running, scratch, wait_for, wait_for_idle

sys.path.insert(0, str(ROOT / "slurm"))

from cluster import Cluster

NODES = 2
RANKS = 4
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --output={folder}/slurm.log
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth0
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task=2 {torchrun} --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29501" \\
  {by_hand} --steps {steps} --snapshot {folder}/snapshot.pt --steps-file {steps_file}
"""


class ByDtrain:
    """`dtrain launch --launcher slurm`, with submit: sbatch."""

    name = "dtrain"
    env: dict[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self._run = folder / "runs" / "bench"
        self.argv = [str(BIN / "dtrain"), "launch", "--launcher", "slurm", "--run-id", "bench"]
        self.argv += ["--nodes", str(NODES), "--procs", str(RANKS // NODES)]
        self.argv += ["--set", f"train.epochs={ENDLESS}", "--set", "log.every_steps=1"]
        self.argv += ["--set", "checkpoint.every_steps=20", str(JOB)]

    def first_step(self) -> float | None:
        """When the first step was done; its loss is a sum over all ranks."""
        lines = read_json(self._run / "metrics.jsonl")
        return next((line["time"] for line in lines if line["split"] == "train"), None)


class ByHand:
    """A training whose ranks write a line each after every step."""

    name = ""
    env: dict[str, str] = {}
    argv: list[str]

    def __init__(self, folder: Path) -> None:
        self.steps_file = folder / "steps.txt"

    def first_step(self) -> float | None:
        """When the last rank had done its first step."""
        if not self.steps_file.exists():
            return None
        return first_on_all(parse_steps(self.steps_file.read_text()), RANKS, frozenset())


class BySbatch(ByHand):
    """`sbatch` of a script in which srun starts torchrun on each node."""

    name = "sbatch + torchrun"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        script = folder / "job.sbatch"
        script.write_text(
            SCRIPT.format(
                folder=folder,
                torchrun=BIN / "torchrun",
                by_hand=BY_HAND,
                steps=ENDLESS,
                steps_file=self.steps_file,
            )
        )
        self.argv = ["sbatch", "--wait", str(script)]


class BySubmitit(ByHand):
    """A program that submits a function with submitit."""

    name = "submitit"
    env = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": str(BY_HAND.parent),
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        script = BY_HAND.with_name("submitit_digits.py")
        self.argv = [sys.executable, str(script), str(folder), str(self.steps_file)]


WAYS = (ByDtrain, BySbatch, BySubmitit)


def seconds_to_first_step(kind: type[ByDtrain] | type[ByHand], cluster: Cluster) -> float:
    """Of one launch, which is cancelled then; the cluster is idle again when this returns."""
    with scratch() as folder:
        launch = kind(folder)
        try:
            with running(launch.argv, folder, {**cluster.outside(), **launch.env}) as started:
                return float(wait_for(launch.first_step, f"{kind.name}: the first step") - started)
        finally:
            cluster.run(["scancel", "--full", "--signal=KILL", "--user", "root"], check=False)
            cluster.run(["scancel", "--user", "root"], check=False)
            cluster.wait_idle()


def measure(rounds: int, idle: float) -> dict[str, list[float]]:
    """Seconds of each round, by the way's name."""
    found: dict[str, list[float]] = {kind.name: [] for kind in WAYS}
    with Cluster(nodes=NODES) as cluster:
        for number in range(rounds + 1):  # the first brings everything into the page cache
            for kind in WAYS:
                wait_for_idle(idle)
                seconds = seconds_to_first_step(kind, cluster)
                load = os.getloadavg()[0]
                print(f"round {number}: {kind.name:<18} {seconds:5.2f} s, load {load:.1f}")
                if number:
                    found[kind.name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="dtrain on Slurm beside what one writes by hand.")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turns")
    parser.add_argument(
        "--idle", type=float, default=0, metavar="PERCENT", help="wait until the CPU is so idle"
    )
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {arguments.rounds} rounds in turns", flush=True)
    found = measure(arguments.rounds, arguments.idle)
    print("\n" + beside(f"command → first step, {NODES} nodes × {RANKS // NODES} ranks", found))


if __name__ == "__main__":
    main()
