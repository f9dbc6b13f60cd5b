"""One PYTHONHASHSEED for all interpreters of a run, on every host and in every attempt.

Sets of texts are iterated in the order of their hashes. Labels that are numbered by iterating a set
would have other numbers on another node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dtrain.environ import HASH_SEED
from dtrain.run import files
from dtrain.run.rundir import RunDir


def take_hash_seed(run: RunDir, argv: Sequence[str], keep_fd: int | None = None) -> None:
    """Replace this interpreter by one with the run's hash seed, unless it already has that seed.

    Python reads the seed only when it starts. Call this before slow imports.

    Args:
        run: the run. Its plan has the seed. Without one, nothing happens.
        argv: the command that the new interpreter runs.
        keep_fd: a descriptor that stays open in it.
    """
    plan = files.read_json(run.plan) or {}
    seed = plan.get("worker_env", {}).get(HASH_SEED)
    began = Path("/proc/self/environ").read_bytes().split(b"\0")  # after a fork, that of its server
    if seed is None or f"{HASH_SEED}={seed}".encode() in began:
        return
    if keep_fd is not None:
        os.set_inheritable(keep_fd, True)
    os.environ[HASH_SEED] = seed
    os.execv(sys.executable, [sys.executable, *argv])
