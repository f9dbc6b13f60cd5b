"""How long `dtrain runs` takes with thousands of runs: the first time, and then.

One run is trained, and copied with other metrics, arguments and results. Each figure is that of a
new process, from its start to its end::

    python benchmarks/runs.py --runs 5000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from launches import BIN
from startup import aligned, scratch, spread

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "examples" / "digits" / "job.yaml"
LINES = 200
SETTLED_S = 61.0
"""Rows are remembered a minute after the last change of a run."""
STATES = ("succeeded",) * 8 + ("failed", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with scratch() as folder:
        make_runs(folder / "runs", given.runs)
        time.sleep(SETTLED_S)
        rows = [[f"{given.runs} runs", "seconds: median (min - max)", "of CPU"]]
        rows.append(["`dtrain runs`, the first time", *spreads([seconds(folder)])])
        for options in (
            [],
            ["--state", "failed", "--since", "2d"],
            ["--where", "train.loss<0.5", "--where", "args.lr>0.01"],
            ["--sort", "-eval.accuracy", "--columns", "run,args.lr,eval.accuracy"],
            ["--json"],
        ):
            shown = shlex.join(["dtrain", "runs", *options])
            found = [seconds(folder, *options) for _ in range(given.rounds)]
            rows.append([f"`{shown}`", *spreads(found)])
    print(aligned(rows))


def make_runs(runs: Path, number: int) -> None:
    """Train one run, and write the others like it."""
    command = [BIN / "dtrain", "launch", "-q", "--set", "train.epochs=1", "--runs", runs, JOB]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (first,) = runs.iterdir()
    shutil.rmtree(first / "checkpoints")
    chance = random.Random(0)
    job = (first / "resolved.yaml").read_text()
    for index in range(1, number):
        run = runs / f"digits-{index:06d}"
        shutil.copytree(first, run)
        written = job.replace("args: {}", f"args:\n  lr: {chance.uniform(0.001, 0.1)}")
        (run / "resolved.yaml").write_text(written)
        (run / "metrics.jsonl").write_text("".join(metrics(chance)))
        result = run / "attempts" / "0" / "result.json"
        ended = json.loads(result.read_text()) | {"state": chance.choice(STATES)}
        result.write_text(json.dumps(ended))


def metrics(chance: random.Random) -> list[str]:
    """The lines of one training."""
    lines = [
        {"time": time.time(), "step": step, "epoch": 0, "split": "train", "loss": 2 / (step + 1)}
        for step in range(LINES)
    ]
    lines[-1]["loss"] = chance.random()
    lines.append({**lines[-1], "split": "eval", "accuracy": chance.random()})
    return [json.dumps(line) + "\n" for line in lines]


def seconds(folder: Path, *options: str) -> tuple[float, float]:
    """The time of one command, and that of the CPU."""
    started, before = time.monotonic(), os.times()
    command = [BIN / "dtrain", "runs", *options]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    now = os.times()
    cpu = now.children_user + now.children_system - before.children_user - before.children_system
    return time.monotonic() - started, cpu


def spreads(found: list[tuple[float, float]]) -> list[str]:
    return [spread([each[k] for each in found]) for k in range(2)]


if __name__ == "__main__":
    main()
