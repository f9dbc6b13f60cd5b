"""How many GPUs a host has for a plan, and what is said where there are too few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.doctor import gpus
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, make_plan
from dtrain.launchers import base


@pytest.mark.parametrize(
    ("visible", "count", "found"),
    [
        (None, 4, 4),
        (None, None, None),
        ("", 4, 0),
        ("", None, 0),
        ("-1", None, 0),
        ("0, 2", 4, 2),
        ("0,7,1", 4, 1),  # CUDA stops at the first that is not there
        ("2,-1,0", 4, 1),
        ("GPU-8932f937,MIG-a1", 4, 2),
        ("none", 4, 0),
        ("0,1", None, None),
    ],
)
def test_what_cuda_shows(visible: str | None, count: int | None, found: int | None) -> None:
    assert gpus.usable(visible, count) == found


@pytest.mark.parametrize(
    ("launcher", "nodes", "asked", "words"),
    [
        ("local", 1, 2, ""),
        ("local", 1, 3, "use --gpus 2"),
        ("local", 2, 2, "use --procs 2 and no --gpus"),  # 4 of this host
        ("torchrun", 2, 2, ""),  # one node of it is this host
        ("slurm", 9, 9, ""),  # no node of it is
    ],
)
def test_what_a_host_lacks(
    launcher: str,
    nodes: int,
    asked: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "installed", lambda: 2)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    sizes = {"nodes": nodes, "gpus_per_node": asked}
    job = JobSpec.model_validate(
        {
            "name": "a",
            "task": "t:T",
            "train": {"epochs": 1, "global_batch_size": 8},
            "launch": sizes,
        }
    )
    facts = Facts("a-1", str(tmp_path), "python3", "laptop", cores=8, free_port=16000)
    plan = make_plan(
        job, job_dir="/job", launcher=launcher, profile=launcher, options=AnyOptions(), facts=facts
    )
    ask = getattr(base.load(launcher), "lacking", lambda plan: "")
    assert words in ask(plan)
    assert bool(ask(plan)) == bool(words)
    if launcher == "local":
        fewer = replace(plan, worker_env={gpus.VISIBLE: ""})
        assert "shows none with CUDA_VISIBLE_DEVICES=''" in ask(fewer)
