"""Launches on a real Slurm cluster from Python."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import dtrain
from cluster import Cluster
from dtrain.errors import PlanError
from support.errors import raises
from support.launch import TINY, until


def test_a_detached_run_continues_alone(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for and stopped as one of another program is."""
    monkeypatch.chdir(tmp_path)
    names = ("Invalid partition name specified", "nowhere")  # Slurm's words
    with raises("slurm.partition-invalid", *names, kind=PlanError):
        dtrain.launch(TINY, launcher="slurm", options={"partition": "nowhere"})
    run = dtrain.launch(
        TINY,
        launcher="slurm",
        nodes=2,
        gpus=0,
        procs=1,
        args={"pause": 0.05},
        train={"steps": 600},
        run_id="alone",
        detach=True,
    )
    assert run.status()["state"] == "running"
    with pytest.raises(TimeoutError):
        run.wait(timeout=0.1)
    until("the first step", run.metrics)
    assert run.stop() == 128 + signal.SIGTERM
    assert run.status()["state"] == "cancelled"
