"""`python -P -m dtrain.worker RUN_DIR`: one rank of a run, placed by the torchrun variables.

dtrain's node agents fork workers instead of running this, but it is the same code, so
torchrun with it as its program, typed by hand, is the same training.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Train, then leave at once; never returns."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.worker", description=__doc__)
    parser.add_argument("run_dir", help="run directory with resolved.yaml and plan.json")
    arguments = parser.parse_args()

    from dtrain.node.hashing import take_hash_seed
    from dtrain.run.rundir import RunDir

    take_hash_seed(RunDir(arguments.run_dir), sys.orig_argv[1:])
    import torch._dynamo  # noqa: F401  any optimizer does, then from the folder of the user's file

    from dtrain.node.worker import run_worker

    status = run_worker(RunDir(arguments.run_dir))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
