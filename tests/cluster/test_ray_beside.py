"""Ray beside other things: Ray Tune above a launch, and a Ray cluster inside a Slurm job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from cluster import Cluster
from dtrain.run.rundir import list_runs
from support import EXAMPLES
from support.launch import TINY, command_of, events, status, the_run, until
from support.ray_cluster import RayCluster, needs_ray
from support.slurm_cluster import submit

IN_SLURM = EXAMPLES / "ray_in_slurm" / "job.sbatch"
SEARCH = EXAMPLES / "ray_tune" / "search.py"


def test_tune_sees_the_metrics_of_its_trials(ray: RayCluster, tmp_path: Path) -> None:
    command = [sys.executable, str(SEARCH), "--address", ray.address, "--trials", "2"]
    done = subprocess.run(
        [*command, "--epochs", "1", "--runs", str(tmp_path / "runs")],
        cwd=tmp_path, env={**os.environ, "RAY_TRAIN_V2_ENABLED": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = list_runs(tmp_path / "runs")
    assert len(runs) == 2
    told = {line for line in done.stdout.splitlines() if line.startswith("lr ")}
    for run in runs:
        (line,) = [
            line
            for line in map(json.loads, run.metrics.read_text().splitlines())
            if line["split"] == "eval"
        ]
        assert any(text.endswith(f"accuracy {line['accuracy']:.4f}") for text in told), told
    assert "best: lr" in done.stdout


def test_a_ray_cluster_inside_a_slurm_job(slurm_cluster: Cluster, tmp_path: Path) -> None:
    needs_ray()
    log, path = tmp_path / "log", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    size = ("--nodes=2", "--cpus-per-task=2", f"--output={log}", f"--chdir={tmp_path}")
    launch = ("--nodes", "2", "--procs", "1", "--runs", str(tmp_path / "runs"), str(TINY))
    job = submit(slurm_cluster, *size, f"--export=ALL,PATH={path}", str(IN_SLURM), *launch)

    def is_over() -> bool:
        return not slurm_cluster.run(["squeue", "-h", "-j", job], check=False).stdout.strip()

    try:
        until("the job's end", is_over, 300)
    finally:
        slurm_cluster.run(["scancel", job], check=False)
        slurm_cluster.wait_idle()
    said = "".join(each.read_text(errors="replace") for each in tmp_path.glob("*log"))
    assert list_runs(tmp_path / "runs"), said[-3000:]
    assert status(the_run(tmp_path))["state"] == "succeeded", said[-3000:]
    (began,) = events(the_run(tmp_path), "attempt_started")
    assert len(set(began["nodes"])) == 2
    shown = slurm_cluster.run(["scontrol", "show", "job", job]).stdout
    assert "ExitCode=0:0" in shown, said[-3000:]
    assert not list(tmp_path.glob(".ray-*"))  # the token
    assert not [p for p in psutil.process_iter() if f"/tmp/ray-{job}-" in command_of(p)]
