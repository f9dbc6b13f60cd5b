"""Checkpoints of a training on a GPU, written while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint import store
from dtrain.train.checkpoint.content import contribution, read_checkpoint
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.store import CheckpointStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_what_was_there_when_the_save_began_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SMALL", 0)
    checkpoints = CheckpointStore(RunDir(tmp_path), RankInfo(), Retention(2), 0.25)
    state: dict[str, Any] = {
        "large": torch.randn(3_000_001, device="cuda"),
        "half": torch.randn(7, 5, device="cuda").bfloat16(),
        "complex": torch.randn(9, device="cuda", dtype=torch.complex64),
        "here": torch.arange(5),
    }
    try:
        for step in (1, 2):
            expected = {name: each.cpu().clone() for name, each in state.items()}
            content = contribution({"model": state}, {}, {"step": step}, 0, 1)
            assert checkpoints.save(step, content, {}, wait=False) is None
            for each in state.values():
                each.zero_()
            saved = checkpoints.finish()
            assert saved is not None
            model = read_checkpoint(saved.folder)[0]["model"]
            assert all(torch.equal(model[name], each) for name, each in expected.items())
            state["large"].normal_()
    finally:
        checkpoints.close()
