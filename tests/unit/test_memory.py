"""What is told of memory."""

from __future__ import annotations

import psutil
import pytest

from dtrain import memory
from dtrain.memory import Memory


def test_what_is_told_is_this_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Memory()
    assert not now.ran_out()
    total = f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    assert now.describe(3 << 30).startswith(f"the rank had 3.2 GB at most, the node has {total}, ")
    assert "swapped" not in now.describe(100 << 30)
    counted = memory._swapped()
    monkeypatch.setattr(memory, "_swapped", lambda: counted + (2 << 30))  # no test may make it swap
    assert now.describe(3 << 30).endswith(", and 2.1 GB were swapped meanwhile")
