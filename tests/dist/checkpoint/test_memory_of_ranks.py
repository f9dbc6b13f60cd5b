"""No rank needs memory for more than its share, neither to save nor to load."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from dtrain.testing import run_ranks
from support.growth import growth
from support.sharded import Sharded

LAYERS, WIDTH = 4, 1768  # 12.5 million parameters; with Adam's moments 150 MB
SPARE = 60_000_000
"""What a rank may need besides: blocks of files, what sums and sockets need, unused memory."""


def saved_and_loaded(folder: Path) -> tuple[int, ...]:
    """Return the bytes of this rank's share, and the growth of four calls.

    They are one that needs 100 MB, one that saves, one that saves in the background, and one that
    loads.
    """
    seen = growth(lambda: torch.ones(25_000_000).sum())
    one = Sharded(LAYERS, WIDTH, seed=1)
    one.step()
    share = sum(each.nbytes for each in one.tensors().values())
    saving = growth(lambda: one.save(folder))
    staging = growth(lambda: one.save(folder, 0.25))
    expected = one.tensors()
    other = Sharded(LAYERS, WIDTH, seed=2)
    dist.barrier()
    loading = growth(lambda: other.load(folder))
    found = other.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    return share, seen, saving, staging, loading


def test_a_rank_needs_memory_for_its_share_alone(tmp_path: Path) -> None:
    for share, seen, saving, staging, loading in run_ranks(saved_and_loaded, 4, tmp_path):
        assert 37_000_000 < share < 38_000_000
        assert seen > 90_000_000  # what is measured here
        assert saving <= SPARE
        assert staging <= share + SPARE  # the copy
        assert loading <= share + SPARE
