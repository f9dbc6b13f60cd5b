"""The digits on one GPU, through the front door: NCCL, half precision, resuming."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dtrain.run.rundir import RunDir, list_runs
from dtrain.run.step_profile import read_step_profiles
from support import EXAMPLES
from support.errors import assert_shown

JOB = EXAMPLES / "digits" / "job.yaml"
MODULE = EXAMPLES / "lightning" / "job.yaml"
ONE_GPU = ("--gpus", "1", "--procs", "1")


@cache
def num_gpus() -> int:
    """GPUs that torch can use; asked in another process, so that nothing here touches CUDA."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_gpus() == 0, reason="no CUDA device that torch can use"),
]


def dtrain(*arguments: str | Path, cwd: Path) -> str:
    """Run a command that must succeed; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(cwd: Path, *arguments: str, epochs: int = 3, job: Path = JOB) -> RunDir:
    """Train the digits for a few epochs; the run."""
    settings = ("--set", f"train.epochs={epochs}", "--set", "log.every_steps=1")
    before = {run.id for run in list_runs(cwd / "runs")}
    dtrain("launch", *arguments, *settings, job, cwd=cwd)
    (run,) = [run for run in list_runs(cwd / "runs") if run.id not in before]
    return run


def metrics(run: RunDir, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def plan(run: RunDir) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(run.plan.read_text())
    return loaded


@pytest.mark.parametrize("strategy", ["single", "dp", "ddp"])
def test_one_gpu_trains_as_the_cpu_does(tmp_path: Path, strategy: str) -> None:
    run = train(tmp_path, *ONE_GPU, "--strategy", strategy)
    assert (plan(run)["device"], plan(run)["backend"]) == ("cuda", "nccl")
    assert metrics(run, "eval")[-1]["accuracy"] >= 0.9
    reference = train(tmp_path, "--procs", "1", "--strategy", "single")
    # cuDNN's convolutions add in another order, and TF32 may be on for them: 10 bits
    for here, there in zip(metrics(run)[:5], metrics(reference)[:5], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(tmp_path: Path, precision: str) -> None:
    run = train(tmp_path, *ONE_GPU, "--set", f"train.precision={precision}")
    assert metrics(run, "eval")[-1]["accuracy"] >= 0.9
    losses = [line["loss"] for line in metrics(run)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_resume_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    run = train(tmp_path, *ONE_GPU, epochs=1)
    dtrain("resume", run.id, "--set", "train.epochs=2", cwd=tmp_path)
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, 2 * (len(steps) // 2) + 1))
    assert metrics(run, "eval")[-1]["accuracy"] >= 0.8


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_checkpoint_moves_between_devices(tmp_path: Path, first: str) -> None:
    size = {"cpu": ("--gpus", "0", "--procs", "2"), "gpu": ONE_GPU}
    second = {"cpu": "gpu", "gpu": "cpu"}[first]
    run = train(tmp_path, *size[first], epochs=1)
    dtrain("resume", run.id, *size[second], "--set", "train.epochs=3", cwd=tmp_path)
    assert plan(run)["device"] == {"cpu": "cpu", "gpu": "cuda"}[second]
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert metrics(run, "eval")[-1]["accuracy"] >= 0.9


def as_on_the_cpu(cwd: Path, *arguments: str) -> RunDir:
    """Train the LightningModule; its first losses are those of the CPU."""
    run = train(cwd, *arguments, job=MODULE)
    assert plan(run)["device"] == "cuda"
    reference = train(cwd, "--procs", "1", "--strategy", "single", job=MODULE)
    for here, there in zip(metrics(run)[:5], metrics(reference)[:5], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)
    return run


@pytest.mark.parametrize("step", ["dtrain", "lightning"])
def test_a_lightning_module_is_trained_and_resumed(tmp_path: Path, step: str) -> None:
    run = as_on_the_cpu(tmp_path, *ONE_GPU, "--set", f"lightning.step={step}")
    done = metrics(run)[-1]["step"]
    dtrain("resume", run.id, "--set", "train.epochs=4", cwd=tmp_path)
    assert metrics(run)[-1]["step"] > done


@pytest.mark.skipif(num_gpus() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("step", ["dtrain", "lightning"])
def test_a_lightning_module_is_cut_over_two_gpus(tmp_path: Path, step: str) -> None:
    two = ("--gpus", "2", "--procs", "2", "--strategy", "fsdp")
    as_on_the_cpu(tmp_path, *two, "--set", f"lightning.step={step}")


def test_more_gpus_than_there_are_is_told(tmp_path: Path) -> None:
    asked = num_gpus() + 1
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dtrain",
            "launch",
            "--gpus",
            str(asked),
            "--procs",
            str(asked),
            JOB,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert_shown(done.stderr, "plan.too-few-gpus", f"{asked} GPUs", f" {num_gpus()}")


@pytest.mark.skipif(num_gpus() < 2, reason="needs two CUDA devices")
def test_simulated_nodes_have_gpus_of_their_own(tmp_path: Path) -> None:
    run = train(tmp_path, "--nodes", "2", *ONE_GPU)
    assert plan(run)["world_size"] == 2
    assert metrics(run, "eval")[-1]["accuracy"] >= 0.9


def test_phases_of_a_gpu_add_up(tmp_path: Path) -> None:
    dtrain("launch", *ONE_GPU, "--set", "train.epochs=40", JOB, cwd=tmp_path)
    (report,) = json.loads(dtrain("report", "--json", cwd=tmp_path))
    spent = report["phases"]["0"]
    steps = spent.pop("steps")
    assert steps == report["step"]
    assert min(spent["forward"], spent["backward"], spent["optimizer"]) > 0
    assert 0.5 * report["seconds"]["steps"] < sum(spent.values()) <= report["duration"]
    found = json.loads(dtrain("top", "--json", cwd=tmp_path))
    (gpu, *_) = found["nodes"]["0"]["gpus"]
    assert 0 < gpu["memory_used"] < gpu["memory_total"]


def test_a_profile_has_kernels_and_a_memory_snapshot(tmp_path: Path) -> None:
    run = train(tmp_path, *ONE_GPU, "--profile", "steps=5:7", epochs=1)
    (found,) = read_step_profiles(run)
    assert (found.first_step, found.last_step) == (5, 7)
    assert found.memory is not None
    assert (run.path / found.memory).stat().st_size > 0
    assert found.operators[0].device_s > 0
    assert found.operators[0].share == max(each.share for each in found.operators)
    with gzip.open(run.path / found.trace) as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "cpu_op", "user_annotation"} <= kinds
