"""digits.py as one submits it with submitit by hand: 2 nodes, 2 tasks on each.

Run it as `python submitit_digits.py FOLDER STEPS_FILE`; it ends when the job does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import submitit

NODES = 2
RANKS_PER_NODE = 2


def train(snapshot: Path, steps_file: Path) -> None:
    import torch.distributed as dist
    from digits import train

    submitit.helpers.TorchDistributedEnvironment().export()
    dist.init_process_group("gloo")
    train(steps=1_000_000, snapshot=snapshot, snapshot_every=20, steps_file=steps_file)


def main() -> None:
    folder, steps_file = map(Path, sys.argv[1:])
    executor = submitit.AutoExecutor(folder)
    executor.update_parameters(nodes=NODES, tasks_per_node=RANKS_PER_NODE, timeout_min=30)
    executor.submit(train, folder / "snapshot.pt", steps_file).result()


if __name__ == "__main__":
    main()
