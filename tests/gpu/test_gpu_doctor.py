"""`dtrain doctor` on a host with a GPU: the real library of the driver."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from dtrain.doctor import gpus
from support.launch import TINY, dtrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpus.installed(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="needs nvidia-ml-py"),
]


def test_gpus_and_their_driver(tmp_path: Path) -> None:
    done = dtrain("doctor", "--json", "--gpus", "1", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    assert found["driver"]["status"] == "ok"
    assert " supports CUDA " in found["driver"]["fact"]
    assert "(NVIDIA " in found["gpus"]["fact"]
    assert "sees no GPU" not in found["torch"]["fact"]


def test_the_nodes_of_a_launch(tmp_path: Path) -> None:
    done = dtrain("launch", "--preflight", "--gpus", "1", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 1 asked for" in done.stdout
