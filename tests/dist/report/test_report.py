"""`dtrain report` of real runs: with a failure, a slow rank, several runs, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import EXAMPLES
from support.errors import assert_shown
from support.launch import TINY, dtrain, the_run

FAILS = ("--set", "args.misbehave=raise", "--set", "args.rank=0", "--set", "args.at=2")
FEW = ("--procs", "2", "--set", "checkpoint.every_steps=4")


def reported(*runs: str | Path, cwd: Path) -> list[dict[str, Any]]:
    done = dtrain("report", *runs, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_a_failure_cost(tmp_path: Path) -> None:
    done = dtrain(
        "launch", *FEW, "--nodes", "2", "--max-restarts", "1", "--set", "args.pause=0.2",
        "--set", "args.misbehave=kill", "--set", "args.at=7",
        "--set", f"args.once={tmp_path / 'once'}", TINY, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = reported(cwd=tmp_path)
    seconds = report["seconds"]
    assert 0.3 < seconds["repeated"] < seconds["steps"]  # steps 5 and 6, of twelve
    assert sum(seconds.values()) == pytest.approx(report["duration"], abs=0.5)
    assert report["goodput"] == pytest.approx(seconds["steps"] / sum(seconds.values()), abs=1e-3)
    assert sorted(report["phases"]) == ["0", "1", "2", "3"]
    # a rank that is killed has not written its last second
    assert report["phases"]["0"]["steps"] >= 8
    page = dtrain("report", "-o", "page.html", cwd=tmp_path)
    assert (page.returncode, page.stdout) == (0, "report: page.html\n")
    text = (tmp_path / "page.html").read_text()
    assert "steps that were lost and trained again" in text
    assert "rank 1 failed" in text or "rank 0 failed" in text


def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, torch, dtrain\n"
        "class Slow(dtrain.Task):\n"
        "    def model(self): return torch.nn.Linear(4, 1)\n"
        "    def train_dataset(self):\n"
        "        return torch.utils.data.TensorDataset(torch.ones(64, 4), torch.ones(64, 1))\n"
        "    def optimizer(self, model): return torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    def loss(self, model, batch):\n"
        "        time.sleep(0.1 if dtrain.rank() == 1 else 0.03)\n"
        "        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])\n"
    )
    (tmp_path / "job.yaml").write_text(
        "name: slow\ntask: slow.py:Slow\ntrain: {global_batch_size: 3, steps: 20}\n"
    )
    done = dtrain("launch", "-q", "--procs", "3", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = reported(cwd=tmp_path)
    forward = {rank: spent["forward"] for rank, spent in report["phases"].items()}
    waits = {rank: spent["reduction"] for rank, spent in report["phases"].items()}
    assert forward["1"] > 1.5 * max(forward["0"], forward["2"])
    assert waits["1"] < 0.5 * min(waits["0"], waits["2"])
    assert dtrain("report", "-o", "page.html", cwd=tmp_path).returncode == 0
    assert "Rank 1 is a straggler" in (tmp_path / "page.html").read_text()


def test_a_run_that_failed_and_a_script_are_shown_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print('<b>hello</b>')\n")
    assert dtrain("launch", "script.py", cwd=tmp_path).returncode == 0
    script = the_run(tmp_path)
    failed = dtrain("launch", *FAILS, TINY, cwd=tmp_path)
    assert failed.returncode == 1
    first, second = reported("last", script.id, cwd=tmp_path)
    assert (first["state"], first["failed_attempts"]) == ("failed", [0])
    assert (second["id"], second["phases"]) == (script.id, {})
    done = dtrain("report", "last", script.id, "-o", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    assert "FAILED" in text
    assert "script.py" in text


def test_lightnings_own_loops_have_phases_too(tmp_path: Path) -> None:
    job = EXAMPLES / "lightning" / "job.yaml"
    own = ("--set", "lightning.step=lightning", "--set", "train.epochs=1")
    done = dtrain("launch", "-q", "--procs", "2", *own, job, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = reported(cwd=tmp_path)
    for spent in report["phases"].values():
        assert spent.pop("steps") == report["step"]
        assert {"data", "forward", "backward", "reduction", "optimizer", "evaluation"} <= {*spent}
        assert sum(spent.values()) <= report["duration"]


def test_a_run_that_was_only_planned(tmp_path: Path) -> None:
    assert dtrain("plan", "--write", TINY, cwd=tmp_path).returncode == 0
    (report,) = reported(cwd=tmp_path)
    assert (report["state"], report["goodput"]) == ("prepared", None)
    assert dtrain("report", "-o", "page.html", cwd=tmp_path).returncode == 0


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print(1)\n")
    assert dtrain("launch", "-q", "script.py", cwd=tmp_path).returncode == 0
    for words, code in (
        (["nothing"], "run.not-found"),
        (["last", "-o", "missing/page.html"], "file.not-writable"),
        (["last", "-o", "."], "usage.invalid-value"),
    ):
        done = dtrain("report", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert_shown(done.stderr, code)
