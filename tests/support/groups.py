"""Which tests share a worker of pytest-xdist, and which begin first."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

_TOGETHER = {
    "tests/cluster/test_ray_": "a Ray cluster",
    "tests/cluster/test_slurm_launch.py": "a Slurm cluster",
    "tests/cluster/test_slurm_": "another Slurm cluster",
}
"""Groups of files by how their names begin; the first that fits."""

_FILES = (
    "test_commands", "test_export", "test_lightning_launch", "test_testing_ranks", "test_url",
    "test_verify_bugs", "test_wheel",
)  # fmt: skip
"""Each makes something once for all of its tests."""


class Groups(LoadScopeScheduling):
    """Tests that share a cluster or a file's fixture go to one worker, others to whoever is free.

    They begin in the order of their folders: clusters, where most of the waiting is, come first,
    and the short ones of `unit` last.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # by the number of tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        for beginning, group in _TOGETHER.items():
            if file.startswith(beginning):
                return group
        return file if file.rpartition("/")[2].removesuffix(".py") in _FILES else nodeid
