"""`--profile` of real runs: what it writes, that it changes nothing, and restarts."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import dtrain as package
from dtrain.run.step_profile import StepProfile, read_step_profiles
from support import ROOT
from support.launch import TINY, dtrain, events, metrics, the_run

TWO = ("--nodes", "2", "--procs", "1")
MODULE = ROOT / "examples" / "lightning" / "job.yaml"


def profiles(cwd: Path) -> list[StepProfile]:
    return list(read_step_profiles(the_run(cwd)))


def ran(cwd: Path, *arguments: str | Path) -> str:
    done = dtrain("launch", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_profile_is_written_and_changes_nothing(tmp_path: Path) -> None:
    ran(tmp_path, *TWO, "--run-id", "plain", TINY)
    said = ran(tmp_path, *TWO, "--run-id", "seen", "--profile", "steps=4:6,ranks=all", TINY)
    plain, seen = (package.Run.find(name, runs=tmp_path / "runs") for name in ("plain", "seen"))
    losses = [[line["loss"] for line in metrics(run.directory)] for run in (plain, seen)]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]  # to the last digit
    digests = [run.status()["parameters_sha256"] for run in (plain, seen)]
    assert digests[0] == digests[1]

    found = seen.profiles()
    assert not plain.profiles()
    assert [each.rank for each in found] == [0, 1]
    for each in found:
        assert (each.first_step, each.last_step, each.attempt, each.device) == (4, 6, 0, "cpu")
        assert 0 < each.communication.seconds < each.seconds
        # gradients, and the losses with the flags of all ranks
        assert each.communication.calls["gloo:all_reduce"] >= 2 * 3
        assert "aten::addmm" in {operator.name for operator in each.operators}
        assert f"{seen.path / each.trace}" in said
        with gzip.open(seen.path / each.trace) as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"ProfilerStep#4", "dtrain: backward", "gloo:all_reduce"} <= names

    report = json.loads(dtrain("report", "seen", "--json", cwd=tmp_path).stdout)
    assert report[0]["profiles"] == [asdict(each) for each in found]
    assert dtrain("report", "seen", "-o", "page.html", cwd=tmp_path).returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Profile</h2>" in page
    assert found[1].trace in page
    compared = json.loads(dtrain("compare", "plain", "seen", "--json", cwd=tmp_path).stdout)
    assert list(compared["job"]) == []
    assert any(name.startswith("profile") for name in compared["launch"])


def test_each_attempt_has_its_own(tmp_path: Path) -> None:
    end = ("--set", "train.steps=6", "--set", "checkpoint.every_steps=3")
    said = ran(tmp_path, *end, TINY)
    passed = dtrain("resume", "--set", "train.steps=9", "--profile", "steps=2:6", cwd=tmp_path)
    assert passed.returncode == 2
    assert "[run.profile-passed]" in passed.stderr
    done = dtrain("resume", "--set", "train.steps=9", "--profile", "steps=5:8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = profiles(tmp_path)
    assert (found.attempt, found.first_step, found.last_step) == (1, 7, 8)
    assert found.trace.startswith("attempts/1/")
    assert "profile" not in said


def test_steps_that_are_passed_again_after_a_failure(tmp_path: Path) -> None:
    ran(
        tmp_path, "--max-restarts", "1", "--set", f"args.once={tmp_path / 'once'}",
        "--set", "args.misbehave=kill", "--set", "args.at=7", "--set", "args.rank=0",
        "--set", "checkpoint.every_steps=3", "--profile", "steps=5:7", TINY,
    )  # fmt: skip
    assert [event["restart"] for event in events(the_run(tmp_path), "workers_started")] == [0, 1]
    (found,) = profiles(tmp_path)
    assert (found.restart, found.first_step, found.last_step) == (1, 7, 7)


def test_steps_that_are_not_reached(tmp_path: Path) -> None:
    said = ran(tmp_path, "--set", "train.epochs=1", "--profile", "steps=900", MODULE)
    assert "step 900 was not reached" in said
    assert not profiles(tmp_path)


def test_lightnings_own_loops(tmp_path: Path) -> None:
    way = ("--set", "lightning.step=lightning", "--set", "train.epochs=1")
    ran(tmp_path, *way, "--profile", "steps=3:4", MODULE)
    (found,) = profiles(tmp_path)
    assert (found.first_step, found.last_step) == (3, 4)
    assert {"aten::addmm", "aten::mm"} & {operator.name for operator in found.operators}


def test_a_script_counts_the_steps_of_its_optimizer(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(9, 9))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for step in range(8):\n"
        "    model(torch.ones(2, 9)).sum().backward()\n"
        "    optimizer.step()\n"
    )
    two = ("--procs", "2", "--profile")
    ran(tmp_path, *two, "steps=4:6,ranks=1", "train.py")
    (found,) = profiles(tmp_path)
    assert (found.rank, found.first_step, found.last_step) == (1, 4, 6)
    assert found.communication.calls == {"gloo:all_reduce": 3}
    said = ran(tmp_path, *two, "steps=20", "train.py")
    assert "rank 0 recorded no step from 20 to 20" in said
