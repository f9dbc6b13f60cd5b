"""What users bring, on a cluster: a module, a program that is not Python, and their settings."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from support import JOBS
from support.launch import dtrain, metrics, status, the_run

KINDS = ("module", "command")
_FLAGS = {"module": ("-m", "package.train"), "command": ("--no-python", "./train.sh")}


def restarts_on(where: tuple[str, ...], folder: Path, kind: str) -> None:
    """Launch a program on two nodes, of which a rank fails once."""
    project = Path(shutil.copytree(JOBS / "programs", folder / "project"))
    python = ("--env", f"PATH={Path(sys.executable).parent}:/usr/bin:/bin")
    how = {"module": "raise", "command": "fail"}[kind]
    arguments = (*_FLAGS[kind], "--max-restarts", "1", "--", str(folder / "seen"), how)
    done = dtrain("launch", *where, *python, *arguments, cwd=project, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    reason = {"module": "ValueError: raised as asked", "command": "ended with code 3"}[kind]
    assert f"{reason}; restart 1 of 1" in done.stdout
    assert "ranks together: 2, arguments" in done.stdout
    run = the_run(project)
    assert status(run)["state"] == "succeeded"
    if kind == "command":
        logs = [path.read_text() for _, path in run.rank_logs(0).values()]
        assert [log.count("loading: 100%") for log in logs] == [2, 2], "a bar is one line"
        assert sum("no such file: corpus.txt" in log for log in logs) == 1


def trains_as_one_process(
    where: tuple[str, ...], folder: Path, job: Path, names: tuple[str, ...]
) -> None:
    """Train a few steps on a cluster, and in one process here: these metrics are the same."""
    few = ("--set", "train.steps=8", "--set", "log.every_steps=1", job)
    made = []
    for name, how in {"there": where, "here": ("--strategy", "single", "--procs", "1")}.items():
        (folder / name).mkdir()
        done = dtrain("launch", *how, *few, cwd=folder / name, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = metrics(the_run(folder / name))
        made.append([line[name] for line in lines for name in ("step", *names)])
    assert len(made[0]) >= 8 * (1 + len(names))
    assert made[0] == pytest.approx(made[1], abs=1e-5)
