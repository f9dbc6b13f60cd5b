"""Scripts of Accelerate and of Hugging Face's Trainer, with their real packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import JOBS
from support.launch import dtrain, events, the_run

SCRIPTS = JOBS / "scripts"
BIN = Path(sys.executable).parent
MULTI_CPU = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: bf16
dynamo_config: {dynamo_backend: EAGER, dynamo_mode: reduce-overhead}
"""
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: bf16
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Block
  fsdp_cpu_ram_efficient_loading: false
  fsdp_reshard_after_forward: true
"""
SHOW = """\
import json, os
from pathlib import Path
if os.environ.get("RANK", "0") == "0":
    prefixes = ("ACCELERATE_", "FSDP_", "KMP_")
    found = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    Path(os.environ["INTO"]).write_text(json.dumps(found))
"""


@pytest.mark.parametrize("config", [MULTI_CPU, FSDP], ids=["cpu", "fsdp"])
def test_the_config_file_sets_what_accelerate_launch_sets(tmp_path: Path, config: str) -> None:
    (tmp_path / "accelerate.yaml").write_text(config)
    (tmp_path / "show.py").write_text(SHOW)
    job = {"name": "a", "script": "show.py", "accelerate_config": "accelerate.yaml"}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    theirs = [str(BIN / "accelerate"), "launch", "--config_file", "accelerate.yaml", "show.py"]
    done = subprocess.run(
        theirs, cwd=tmp_path, env={**os.environ, "INTO": "theirs"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = dtrain("launch", "job.yaml", cwd=tmp_path, env={"INTO": "ours"})
    assert ours.returncode == 0, ours.stdout
    assert ", 2 ranks" in ours.stdout
    found = [json.loads((tmp_path / name).read_text()) for name in ("ours", "theirs")]
    assert found[0] == found[1]
    assert found[0]["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_a_script_of_accelerate_trains_and_goes_on(tmp_path: Path) -> None:
    """On four ranks of two nodes, by its config; with sampler, checkpoint and check."""
    config = MULTI_CPU.replace("machines: 1", "machines: 2").replace("processes: 2", "processes: 4")
    lines = [line for line in config.splitlines() if not line.startswith("dynamo")]
    (tmp_path / "accelerate.yaml").write_text("\n".join(lines))
    (tmp_path / "train.py").write_text((SCRIPTS / "with_accelerate.py").read_text())
    job = {"name": "a", "script": "train.py", "accelerate_config": "accelerate.yaml"}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    done = dtrain("launch", "--max-restarts", "1", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "begins after step 3" in done.stdout
    assert "accelerate: 4 processes, bf16, 8 steps, one model True" in done.stdout
    assert [event["step"] for event in events(the_run(tmp_path), "resumed")] == [3]


def test_the_trainer_of_hugging_face_trains_as_under_torchrun(tmp_path: Path) -> None:
    script = str(SCRIPTS / "with_trainer.py")
    theirs = subprocess.run(
        [str(BIN / "torchrun"), "--nproc-per-node", "2", script], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    ours = dtrain("launch", "--procs", "2", script, cwd=tmp_path)
    assert ours.returncode == 0, ours.stdout
    said = [re.findall(r"trained 8 steps on 2, \S+", each.stdout) for each in (ours, theirs)]
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert len(re.findall(r"100%\|.*\| 8/8 ", ours.stdout)) == 1, "its bar is one line"
    assert "no process group" not in ours.stdout
