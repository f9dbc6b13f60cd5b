"""The checks on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain.train.checks import digest
from support import JOBS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY = JOBS / "tiny" / "job.yaml"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sums_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    tensor = torch.randn(100_003).to(dtype)
    on_gpu = digest.weighted_sum(tensor.cuda()).cpu()
    assert torch.equal(on_gpu, digest.weighted_sum(tensor))
    assert digest.of_each([tensor.cuda()]) != digest.of_each([tensor.cuda().flip(0)])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_fault_on_a_gpu_is_found(tmp_path: Path) -> None:
    fault = "rank=1,step=5,kind=flip-parameter-bit,param=weight,element=2,bit=20"
    command = [sys.executable, "-m", "dtrain", "launch", "--gpus", "2", "--inject", fault]
    done = subprocess.run(
        [*command, "--set", "checks.every=2", str(TINY)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "parameters: weight[0, 2] is" in done.stdout
