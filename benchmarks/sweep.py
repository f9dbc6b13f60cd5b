"""How long a sweep takes: `dtrain launch --sweep` beside loops of launches in a shell.

Eight short trainings of examples/digits in one process each, which differ in their learning rate or
seed, on the CPU of this machine, in turns::

    python benchmarks/sweep.py --rounds 3

The loops start by_hand/digits.py, the same training written by hand, with torchrun: one after
another, and with `xargs -P` as many at the same time as there are cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path

from launches import BIN, BY_HAND, JOB
from startup import beside, scratch

RUNS = 8
STEPS = 46


def dtrain(folder: Path) -> None:
    """Launch a sweep of one process per run."""
    sizes = ["--procs", "1", "--set", f"train.steps={STEPS}", "--set", "train.epochs=null"]
    swept = ["--sweep", f"seed=0..{RUNS - 1}"]
    subprocess.run(
        [BIN / "dtrain", "launch", "-q", *sizes, *swept, JOB],
        cwd=folder, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def loop(folder: Path, at_once: int) -> None:
    """Start torchrun for each run, a number of them at the same time."""
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    line = (
        f"seq {RUNS} | xargs -P {at_once} -I@ {BIN / 'torchrun'} --standalone --nproc-per-node=1 "
        f"{BY_HAND} --steps {STEPS} --snapshot @.pt --snapshot-every {STEPS} --steps-file @.txt"
    )
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(["sh", "-c", line], cwd=folder, check=True, env=env, capture_output=True)
    assert len(list(folder.glob("*.txt"))) == RUNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    cores = len(os.sched_getaffinity(0))
    ways = {
        "dtrain launch --sweep": dtrain,
        f"torchrun, {cores} at a time": lambda folder: loop(folder, cores),
        "torchrun, one after another": lambda folder: loop(folder, 1),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with scratch() as folder:
                began = time.perf_counter()
                way(folder)
                found[name].append(time.perf_counter() - began)
    print(beside(f"{RUNS} runs of {STEPS} steps", found))


if __name__ == "__main__":
    main()
