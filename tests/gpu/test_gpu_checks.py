"""The checks on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain import EMA
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train import digest
from dtrain.train.context import TrainContext
from dtrain.train.loop.native import NativeTrainer
from support import JOBS
from support.trainings import Regression, job

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
        [*command, "--set", "checks.every_steps=2", str(TINY)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "parameters: weight[0, 2] is" in done.stdout


class Remembering(Regression):
    """Keeps a tensor on the device and one beside it, and an average."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.there: torch.Tensor | None = None
        self.here = torch.zeros(())

    def loss(self, model: torch.nn.Module, batch: Any) -> Any:
        # `Regression.loss` reads inputs as NumPy, which is of the CPU
        errors = (model.predict(batch["x"]) - batch["y"]).square().mean()
        return errors if self.there is None else errors * (1 + self.there)

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": (model.predict(batch["x"]) - batch["y"]).square().mean()}

    def callbacks(self) -> list[Any]:
        return [EMA(decay=0.8)]

    def _after_step(self, *_: Any) -> None:
        self.there = (0.0 if self.there is None else self.there) + torch.ones((), device="cuda")
        self.here = self.here + 1
        super()._after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"there": self.there, "here": self.here}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.there, self.here = state["there"], state["here"]
        assert self.there is not None
        assert (self.there.device.type, self.here.device.type) == ("cuda", "cpu")


def test_what_a_task_remembers_is_on_its_device_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good

    def trained(folder: Path, **args: Any) -> Any:
        given = {"n": 56, "held_out": 7, **args}
        spec = job("single", given, checks={"every_steps": 2})
        task, run = Remembering(**given), RunDir(folder)
        run.create()
        device = torch.device("cuda")
        context = TrainContext(spec, run, RankInfo(), 0, task, device, 1, task.stop)
        return NativeTrainer(context).run()

    unbroken = trained(tmp_path / "unbroken")
    assert trained(tmp_path / "broken", stop_after=5).stopped == "test"
    resumed = trained(tmp_path / "broken")
    assert resumed.parameters_sha256 == unbroken.parameters_sha256
    assert resumed.metrics == unbroken.metrics
