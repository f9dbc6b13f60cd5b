"""Launcher `slurm` without a Slurm: submitit's local and debug executors, on this machine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from support.launch import (
    SLOW,
    TINY,
    dtrain,
    events,
    started,
    status,
    the_run,
    until,
    wait_for_step,
)

pytest.importorskip("submitit")


@pytest.fixture(autouse=True)
def place(tmp_path: Path) -> Path:
    """A profile for each executor, in the folder in which we launch."""
    folder = tmp_path / "launchers"
    folder.mkdir()
    for executor in ("local", "debug"):
        (folder / f"{executor}ly.yaml").write_text(
            "launcher: slurm\nextends: slurm\noptions:\n  submit: submitit\n"
            f"  executor: {executor}\n  partition: gpu\n  setup: ['export SET_UP=\"$((6 * 7))\"']\n"
        )
    return folder


@pytest.mark.parametrize("executor", ["local", "debug"])
def test_a_job_is_tried_without_a_slurm(tmp_path: Path, executor: str) -> None:
    env = {"SUBMITIT_ODD": "1", "CUDA_VISIBLE_DEVICES": "5", "PATH": os.environ["PATH"]}
    wrong = ("--set", "args.misbehave=raise", "--set", "args.rank=1")
    two = ("--launcher", f"{executor}ly", "--procs", "2", "--set", f"args.env_to={tmp_path}")
    done = dtrain("launch", *two, *wrong, TINY, cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: rank 1 on node 0" in done.stdout
    seen = json.loads((tmp_path / "1.json").read_text())
    assert (seen["SET_UP"], seen["CUDA_VISIBLE_DEVICES"]) == ("42", "5")
    assert not [name for name in seen if name.startswith("SUBMITIT_")]
    run = the_run(tmp_path)
    assert status(run)["state"] == "failed"
    assert "FAILED: rank 1" in dtrain("why", cwd=tmp_path).stdout
    done = dtrain("resume", "--set", "args.misbehave=null", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (status(run)["state"], status(run)["attempt"]) == ("succeeded", 1)
    assert "step 12/12" in dtrain("logs", cwd=tmp_path).stdout


def test_a_node_without_its_gpus_says_so_before_a_rank_starts(tmp_path: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    done = dtrain("launch", "--launcher", "locally", "--gpus", "2", TINY, cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 GPUs are asked for, but this host shows none" in done.stdout
    assert not events(the_run(tmp_path), "workers_started")


def interrupt_from_terminal(pid: int) -> None:
    """SIGINT to all of a group, as a terminal does it."""
    group = os.getpgid(pid)
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        if os.getpgid(process.pid) == group:
            process.send_signal(signal.SIGINT)


def test_nothing_of_it_outlives_the_command(tmp_path: Path) -> None:
    """Ctrl-C, `dtrain cancel` and kill -9 of the command; kill -9 of submitit's process."""
    slower = ("--set", "args.pause=0.5", "--launcher", "locally", "--procs", "2")
    with started("launch", *SLOW, *slower, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 2)
        interrupt_from_terminal(process.pid)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert status(run)["state"] == "cancelled"

    with started("resume", cwd=tmp_path) as process:
        until("training", lambda: len(events(run, "training_started")) == 2, 60)
        assert dtrain("cancel", cwd=tmp_path).returncode == 0
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert [event["reason"] for event in events(run, "stopped")] == ["SIGTERM"] * 2

    with started("resume", cwd=tmp_path) as process:  # whose end sees that all has ended
        until("training", lambda: len(events(run, "training_started")) == 3, 60)
        process.kill()
    assert status(run)["state"] == "lost"

    with started("resume", cwd=tmp_path) as process:
        until("training", lambda: len(events(run, "training_started")) == 4, 60)
        (below,) = psutil.Process(process.pid).children()
        below.kill()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "submitit's process ended without a result" in output
    assert status(run)["state"] == "failed"
    assert "submitit's process ended without a result" in dtrain("why", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--nodes", "2"),
            "executor: local runs one node, and 2 are asked for (--nodes: nodes: 2)",
        ),
        (("--nodes", "1:2"), "--launcher local simulates several on this machine"),
        (("--detach",), "cannot --detach"),
        (("--array", "seed=1,2"), "--array takes executor: slurm, not local"),
    ],
)
def test_what_takes_a_slurm_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = dtrain("launch", "--launcher", "locally", *arguments, TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("executor: local", "site.yaml:4:13: executor: local is an executor of submitit: say "),
        ("executor: locl", "site.yaml:4:13: executor: expected one of slurm, local, debug; found"),
        (
            "{submit: submitit, executor: debug, apptainer: a.sif}",
            "option apptainer takes executor: slurm, not debug",
        ),
        (
            "{submit: submitit, executor: debug, dependency: 'afterok:1'}",
            "option dependency takes executor: slurm, not debug",
        ),
    ],
)
def test_wrong_options_are_told_with_their_place(
    tmp_path: Path, place: Path, options: str, told: str
) -> None:
    (place / "site.yaml").write_text(f"launcher: slurm\nextends: slurm\noptions:\n  {options}\n")
    done = dtrain("plan", "--launcher", "site", TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr


def test_what_cannot_be_started_is_named(tmp_path: Path, place: Path) -> None:
    path = place / "locally.yaml"
    path.write_text(path.read_text().replace("export SET_UP=", "no-such-module "))
    done = dtrain("launch", "--launcher", "locally", TINY, cwd=tmp_path)
    assert done.returncode == 127, done.stdout + done.stderr
    assert "no-such-module: command not found" in done.stdout
    path.write_text("launcher: slurm\nextends: debugly\noptions:\n  python: /no/python\n")
    done = dtrain("launch", "--launcher", "locally", TINY, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot start /no/python: there is no such program here" in done.stderr
    assert "/no/python: there is no such program here" in dtrain("why", cwd=tmp_path).stdout
