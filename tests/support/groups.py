"""Which tests share a worker of pytest-xdist, and which begin first."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from support import ROOT

_TOGETHER = {
    "tests/cluster/test_ray_": "a Ray cluster",
    "tests/cluster/test_slurm_launch.py": "a Slurm cluster",
    "tests/cluster/test_slurm_": "another Slurm cluster",
}
"""Groups of files by how their names begin; the first that fits."""


class Groups(LoadScopeScheduling):
    """Tests that share a cluster or a file's fixture go to one worker, others to whoever is free.

    They begin in the order of their directories: clusters, where most of the waiting is, come
    first, and the short ones of `unit` last.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False  # by the number of tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        for beginning, group in _TOGETHER.items():
            if file.startswith(beginning):
                return group
        return file if _has_fixtures_of_its_own(file) else nodeid


@functools.cache
def _has_fixtures_of_its_own(file: str) -> bool:
    """Whether a file makes something once for all of its tests."""
    return 'scope="module"' in (ROOT / file).read_text()
