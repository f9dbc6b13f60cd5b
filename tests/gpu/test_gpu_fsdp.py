"""Options of `fsdp` on GPUs, through the front door."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain.train.checkpoint.content import read_checkpoint
from support import JOBS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
TINY = JOBS / "tiny" / "job.yaml"


def launched(folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """Train on two GPUs, and return the parameters of the last checkpoint."""
    command = [sys.executable, "-m", "dtrain", "launch", "--gpus", "2", "--strategy", "fsdp"]
    settings = [each for option in options for each in ("--set", option)]
    folder.mkdir()
    done = subprocess.run(
        [*command, "--set", "train.clip_grad_norm=0.5", *settings, str(TINY)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (checkpoint,) = sorted(folder.glob("runs/*/checkpoints/step-*"))[-1:]
    model: dict[str, torch.Tensor] = read_checkpoint(checkpoint)[0]["model"]
    return model


def test_parameters_on_the_host_are_the_same_training(tmp_path: Path) -> None:
    plain = launched(tmp_path / "plain")
    offloaded = launched(tmp_path / "offloaded", "fsdp.cpu_offload=true")
    for name, value in plain.items():
        torch.testing.assert_close(offloaded[name], value, rtol=1e-5, atol=1e-6)


def test_compiled_blocks_are_the_same_training(tmp_path: Path) -> None:
    plain = launched(tmp_path / "plain")
    compiled = launched(tmp_path / "compiled", "train.compile=true")
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6)
