"""The time and size of `dtrain report` for a long run of many ranks.

    python benchmarks/report.py --steps 100000 --ranks 64

It writes the files that such a run leaves behind, and measures the command that reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dtrain

ROOT = Path(__file__).parents[1]
STEP_S = 0.1
"""How long a step takes. The records of phases and of nodes are written by time."""


def write_run(run: Path, steps: int, ranks: int, *, procs_per_node: int = 8) -> None:
    """Write the files of a run that has succeeded, with one failure and restart at half time.

    A tenth of the steps is between two checkpoints, and between two evaluations.

    Args:
        run: the run directory to make.
        steps: the number of optimizer steps; each has a line of metrics.
        ranks: the number of ranks. Rank 1 is slow.
        procs_per_node: the number of ranks on each node.
    """
    draw = random.Random(0)
    start = 1_700_000_000.0
    end = start + steps * STEP_S + 60
    attempt = run / "attempts" / "0"
    attempt.mkdir(parents=True)
    nodes, job = -(-ranks // procs_per_node), ROOT / "examples" / "digits" / "job.yaml"
    size = {"nodes": nodes, "procs": procs_per_node}
    plan = dtrain.plan(job, runs=run.parent, run_id=run.name, **size)
    _json(run / "plan.json", plan.to_json())
    (run / "resolved.yaml").write_text(job.read_text(encoding="utf-8"), encoding="utf-8")
    driver = {"launcher": "local", "attempt": 0, "first": 0, "host": "a", "pid": 1}
    _json(attempt / "handle.json", {**driver, "identity": None, "started": start, "job_id": None})
    ended = {"state": "succeeded", "exit_code": 0, "started": start, "ended": end}
    _json(attempt / "result.json", ended)
    _lines(run / "metrics.jsonl", _metrics(start, steps, draw))
    _lines(run / "events.jsonl", _events(start, steps, ranks))
    for node in range(nodes):
        folder = attempt / f"node-{node}"
        folder.mkdir()
        own = range(node * procs_per_node, min(ranks, (node + 1) * procs_per_node))
        moments = [*_moments(steps * STEP_S)]
        _lines(folder / "usage.jsonl", (_usage(start + at, own) for at, _ in moments))
        for rank in own:
            records = (_phases(start, at, length, rank, draw) for at, length in moments)
            _lines(folder / f"rank-{rank:05d}.phases.jsonl", records)


def _moments(seconds: float) -> Iterable[tuple[float, float]]:
    """Yield when a record is written, and how long it is: see `dtrain.run.phases.Pace`."""
    at = 0.0
    while at < seconds:
        length = min(60.0, max(1.0, at / 1000))
        at += length
        yield at, length


def _metrics(start: float, steps: int, draw: random.Random) -> Iterable[dict[str, Any]]:
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"time": start + 30 + step * STEP_S, "step": step, "epoch": 0}
        loss = 2 / math.sqrt(step) + 0.01 * draw.random()
        yield {**line, "split": "train", "loss": loss, "lr": 0.1, "samples_per_second": 1e4}
        if step % (steps // 10) == 0:
            yield {**line, "split": "eval", "loss": loss, "accuracy": 1 - loss}


def _events(start: float, steps: int, ranks: int) -> Iterable[dict[str, Any]]:
    half = start + 30 + steps / 2 * STEP_S
    began = {"event": "training_started", "world_size": ranks, "total_steps": steps}
    yield {"time": start + 5, "event": "workers_started", "restart": 0}
    yield {"time": start + 30, **began, "resumed_from": None, "attempt": 0}
    for step in range(steps // 10, steps + 1, steps // 10):
        when = start + 30 + step * STEP_S
        saved = {"event": "checkpoint_saved", "step": step, "checkpoint": f"step-{step:08d}"}
        yield {"time": when, **saved, "attempt": 0, "seconds": 1.0, "stop_seconds": 0.1}
    failed = {"event": "worker_failed", "rank": 1, "what": "a fault", "restart": 0}
    yield {"time": half, **failed}
    yield {"time": half, **began, "resumed_from": steps // 2, "attempt": 0}


def _phases(
    start: float, at: float, length: float, rank: int, draw: random.Random
) -> dict[str, Any]:
    own = (0.6 if rank == 1 else 0.4 + 0.05 * draw.random()) * length
    phases = {
        "data": 0.05 * length, "forward": 0.3 * own, "backward": 0.6 * own,
        "optimizer": 0.1 * own, "reduction": 0.9 * length - own, "other": 0.05 * length,
    }  # fmt: skip
    rounded = {name: round(value, 6) for name, value in phases.items()}
    steps = {"step": round(at / STEP_S), "steps": round(length / STEP_S)}
    return {"time": start + 30 + at, "restart": 0, **steps, "phases": rounded}


def _usage(when: float, ranks: Iterable[int]) -> dict[str, Any]:
    node = {"cpus": 64, "memory_used": 10**10, "memory_total": 10**12}
    return {"time": when, **node, "ranks": {str(r): [1.0, 10**9] for r in ranks}, "gpus": []}


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main() -> None:
    """Write a run, and print the time and the size of its report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "runs" / "long-000000"
        write_run(run, given.steps, given.ranks)
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        print(f"the run: {given.steps} steps, {given.ranks} ranks, {size / 1e6:.0f} MB of records")
        page = Path(name) / "page.html"
        command = [sys.executable, "-m", "dtrain", "report", str(run), "-o", str(page)]
        for _ in range(3):
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - started
            print(f"report: {seconds:.2f} s, {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
