"""Every cell of README's matrix that needs no cluster; the others are in tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.matrix import documented, shown


@pytest.mark.parametrize(("launcher", "nodes"), [("local", 2), ("torchrun", 1)])
def test_the_matrix_is_what_launches_show(launcher: str, nodes: int, tmp_path: Path) -> None:
    """By torchrun this host is one node; `test_launcher_contract.py` has two of them."""
    assert shown(tmp_path, launcher, launcher, nodes=nodes) == documented(launcher)
