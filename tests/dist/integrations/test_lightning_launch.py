"""The Lightning example, launched: with a rank that is killed, and in Lightning's other package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.launch import (
    dtrain,
    events,
    kill,
    metrics,
    started,
    the_run,
    wait_for_step,
    worker_pids,
)
from support.lightning_kill import WAYS, killed_in_mid_epoch

EXAMPLE = ROOT / "examples" / "lightning" / "job.yaml"
SHORT = ("--procs", "2", "--set", "train.epochs=3", "--set", "log.every_steps=1")


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run ended with that lost a rank in between."""
    folder = tmp_path_factory.mktemp("survived")
    restarts = ("--max-restarts", "1", "--set", "checkpoint.every_steps=5")
    with started("launch", *SHORT, *restarts, EXAMPLE, cwd=folder) as process:
        run = wait_for_step(folder, 30)
        kill(worker_pids(run)[1])
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (resumed,) = events(run, "resumed")
    assert resumed["step"] % 5 == 0 or resumed["step"] % 23 == 0
    assert (run.checkpoints / "best" / "manifest.json").is_file()
    (finished,) = events(run, "finished")
    return finished


def test_the_example_survives_the_death_of_a_rank(survived: dict[str, Any]) -> None:
    assert survived["steps"] == 3 * 23
    assert set(survived["metrics"]) == {"val_loss", "val_acc"}
    assert survived["metrics"]["val_acc"] > 0.9


@pytest.mark.parametrize(
    ("launcher", "way"),
    [*(("local", way) for way in WAYS), ("torchrun", "dtrain"), ("torchrun", "lightning")],
)
def test_a_module_is_killed_in_mid_epoch_and_goes_on(
    launcher: str, way: str, tmp_path: Path
) -> None:
    killed_in_mid_epoch(tmp_path, way, "--launcher", launcher, "--procs", "2")


def test_by_torchrun_in_the_package_lightning(survived: dict[str, Any], tmp_path: Path) -> None:
    """One code, two packages that know nothing of each other: the same bits by both."""
    text = EXAMPLE.with_name("module.py").read_text()
    ours, theirs = "import pytorch_lightning as pl\n", "import lightning as pl\n"
    assert ours in text
    (tmp_path / "module.py").write_text(text.replace(ours, theirs))
    (tmp_path / "job.yaml").write_text(EXAMPLE.read_text())
    done = dtrain("launch", "--launcher", "torchrun", *SHORT, "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(tmp_path)
    assert [line["step"] for line in metrics(run, "eval")] == [23, 46, 69]
    (finished,) = events(run, "finished")
    assert finished["parameters_sha256"] == survived["parameters_sha256"]
    assert finished["metrics"] == survived["metrics"]
