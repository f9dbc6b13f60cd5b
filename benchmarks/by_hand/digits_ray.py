"""The training of digits.py as one writes it by hand for Ray Train.

Run it on a host of the cluster: `python digits_ray.py --address HOST:PORT --workers 4 …`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def loop(config: dict[str, Any]) -> None:
    import digits  # from this script's directory, which Ray adds to the path of its workers

    folder = Path(config["folder"])
    digits.train(config["steps"], folder / "snapshot.pt", config["every"], folder / "steps.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--folder", required=True)
    given = parser.parse_args()
    ray.init(address=given.address)
    TorchTrainer(
        loop,
        train_loop_config={"folder": given.folder, "steps": given.steps, "every": given.every},
        scaling_config=ScalingConfig(num_workers=given.workers, placement_strategy="SPREAD"),
        run_config=RunConfig(storage_path=given.folder),
    ).fit()


if __name__ == "__main__":
    main()
