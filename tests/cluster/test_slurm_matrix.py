"""The cells of README's matrix that need Slurm: see `tests/support/matrix.py`."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster
from support.matrix import documented, shown


def test_the_matrix_is_what_launches_on_slurm_show(slurm: Cluster, tmp_path: Path) -> None:
    assert shown(tmp_path, "slurm", "slurm") == documented("slurm")
