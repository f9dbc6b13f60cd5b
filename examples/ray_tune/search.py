"""Ray Tune over a dtrain job: every trial is a separate launch, and Tune gets its metrics.

python examples/ray_tune/search.py --address auto --trials 4

A trial itself needs almost no resources; its launch asks Ray for whole nodes, all or none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune

JOB = Path(__file__).resolve().parents[1] / "digits" / "job.yaml"


def trial(config: dict[str, Any]) -> None:
    """Train once; report the metrics of each evaluation."""
    run_id = f"tune-{tune.get_context().get_trial_id()}"
    address = ray.get_runtime_context().gcs_address
    launch = subprocess.Popen(
        [
            *(sys.executable, "-m", "dtrain", "launch", "--quiet", "--launcher", "ray"),
            *("--address", address, "--nodes", str(config["nodes"]), "--procs", "2"),
            *("--runs", config["runs"], "--run-id", run_id),
            *("--set", f"args.lr={config['lr']}", "--set", f"train.epochs={config['epochs']}"),
            str(JOB),
        ]
    )
    try:
        for line in evaluations(Path(config["runs"], run_id, "metrics.jsonl"), launch):
            tune.report({"accuracy": line["accuracy"], "loss": line["loss"], "step": line["step"]})
    finally:
        launch.terminate()  # Tune may stop a trial early; the workers save and exit
    if launch.wait() != 0:
        raise RuntimeError(f"`dtrain why {run_id} --runs {config['runs']}` says what failed")


def evaluations(path: Path, launch: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield each line of metrics.jsonl with an evaluation, until the launch ends."""
    seen = 0
    while True:
        ended = launch.poll() is not None
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        for text in lines[seen:]:
            line = json.loads(text)
            if line["split"] == "eval":
                yield line
        seen = len(lines)
        if ended:
            return
        time.sleep(0.2)


def main() -> None:
    """Run the search."""
    parser = argparse.ArgumentParser(description="A search over learning rates.")
    parser.add_argument("--address", default="auto", help="address of the Ray cluster")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument(
        "--nodes", type=int, default=1, help="nodes of each trial, with 2 processes each"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", default="runs", help="a directory that all nodes share")
    given = parser.parse_args()
    ray.init(address=given.address, log_to_driver=False)
    runs = os.path.abspath(given.runs)
    rates = [0.03 * 0.3**k for k in range(given.trials)]
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.001}),
        param_space={
            "lr": tune.grid_search(rates),
            **{"nodes": given.nodes, "epochs": given.epochs, "runs": runs},
        },
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", max_concurrent_trials=given.at_once
        ),
        run_config=tune.RunConfig(storage_path=os.path.join(runs, "tune"), verbose=0),
    )
    results = tuner.fit()
    for result in results:
        if result.error is not None:
            sys.exit(f"a trial failed: {result.error}")
        assert result.metrics is not None
        assert result.config is not None
        print(f"lr {result.config['lr']:.4f}: accuracy {result.metrics['accuracy']:.4f}")
    best = results.get_best_result()
    assert best.config is not None
    print(f"best: lr {best.config['lr']:.4f}")


if __name__ == "__main__":
    main()
