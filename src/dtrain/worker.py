"""`python -P -m dtrain.worker RUN_DIR` runs one rank of a run, placed by the torchrun variables.

dtrain's node agents fork workers instead of running this, but the code is the same. So a torchrun
command typed by hand, with this as its program, is the same training.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Train, then exit at once. Never returns."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.worker", description=__doc__)
    parser.add_argument("run_dir", help="run directory with resolved.yaml and plan.json")
    arguments = parser.parse_args()

    from dtrain.node.hashing import take_hash_seed
    from dtrain.run.rundir import RunDir

    take_hash_seed(RunDir(arguments.run_dir), sys.orig_argv[1:])
    # Every optimizer imports it, but by then the directory of the user's file is on sys.path.
    import torch._dynamo  # noqa: F401

    from dtrain.node.worker import run_worker

    status = run_worker(RunDir(arguments.run_dir))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
