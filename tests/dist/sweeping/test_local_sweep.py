"""Sweeps on this machine: what they train, what they show, and what stops them."""

from __future__ import annotations

import json
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

import dtrain as api
from dtrain.run.rundir import RunDir, list_runs
from support.errors import assert_shown, raises
from support.launch import SLOW, TINY, dtrain, metrics, started, status, until

NAMED = ("--run-id", "sweep")


def runs_of(folder: Path, count: int) -> list[RunDir]:
    return [RunDir(folder / "runs" / f"sweep-{index}") for index in range(count)]


def states(folder: Path) -> list[str]:
    listed = json.loads(dtrain("status", "sweep", "--json", cwd=folder).stdout)
    return [row["state"] for row in listed["runs"]]


def sha(run: RunDir) -> Any:
    return status(run)["parameters_sha256"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The parameters of the training with seed 2, when it is launched by itself."""
    cwd = tmp_path_factory.mktemp("alone")
    settings = ("--set", "seed=2", "--set", "train.steps=60", "--run-id", "alone")
    assert dtrain("launch", *settings, TINY, cwd=cwd).returncode == 0
    return sha(RunDir(cwd / "runs" / "alone"))


def test_each_combination_is_a_run(tmp_path: Path, alone: Any) -> None:
    swept = ("--sweep", "args.pause=0,0.001", "--sweep", "seed=2..3", "--at-once", "2", *NAMED)
    done = dtrain("launch", *swept, "--set", "train.steps=60", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep-1 (args.pause=0, seed=3): started; 2 running, 2 waiting" in done.stdout
    assert "sweep-2 (args.pause=0.001, seed=2): succeeded after 60 steps" in done.stdout
    first, second, third, _ = runs = runs_of(tmp_path, 4)
    assert sha(first) == sha(third) == alone != sha(second)
    table = dtrain("status", "sweep", cwd=tmp_path).stdout
    assert table.splitlines()[0].split()[:3] == ["RUN", "args.pause", "seed"]
    assert "4 runs: 4 succeeded" in table
    listed = dtrain("runs", "--where", "sweep=sweep", "--json", cwd=tmp_path).stdout
    assert {row["id"] for row in json.loads(listed)} == {run.id for run in runs}
    report = dtrain("report", "sweep", "-o", "page.html", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "page.html").read_text()
    assert all(run.id in page for run in runs)
    again = dtrain("resume", "sweep", cwd=tmp_path)
    assert_shown(again.stderr, "sweep.finished")


def test_a_sweep_whose_command_is_killed_is_resumed_as_a_whole(tmp_path: Path, alone: Any) -> None:
    swept = ("--sweep", "seed=1..4", "--at-once", "2", *NAMED)
    runs = runs_of(tmp_path, 4)
    with started("launch", *swept, *SLOW, TINY, cwd=tmp_path) as process:
        until("step 5", lambda: any(line["step"] >= 5 for line in metrics(runs[1])), 60)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        until("an orderly end", lambda: "running" not in states(tmp_path), 60)
    assert states(tmp_path) == ["cancelled", "cancelled", "prepared", "prepared"]
    done = dtrain("resume", "sweep", "--set", "args.pause=0", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(tmp_path) == ["succeeded"] * 4
    assert [status(run)["attempt"] for run in runs] == [1, 1, 0, 0]
    assert sha(runs[1]) == alone


def test_ctrl_c_saves_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    swept = ("--sweep", "seed=1..3", "--at-once", "1", *NAMED)
    secret = uuid.uuid4().hex
    swept = (*swept, "--env", f"API_KEY={secret}")
    first, second, _ = runs_of(tmp_path, 3)
    with started("launch", *swept, *SLOW, TINY, cwd=tmp_path) as process:
        until("step 2", lambda: any(line["step"] >= 2 for line in metrics(first)), 60)
        assert not second.secret_env(0).exists()
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert states(tmp_path) == ["cancelled", "prepared", "prepared"]
    assert "continue with: dtrain resume sweep" in output
    assert list(first.checkpoints.glob("step-*"))
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in text for text in texts)


def test_cancel_stops_all_runs_also_those_that_wait(tmp_path: Path) -> None:
    swept = ("--sweep", "seed=1..3", "--at-once", "1", *NAMED)
    first, *_ = runs_of(tmp_path, 3)
    with started("launch", *swept, *SLOW, "--set", "args.pause=0.3", TINY, cwd=tmp_path) as process:
        until("step 2", lambda: any(line["step"] >= 2 for line in metrics(first)), 60)
        done = dtrain("cancel", "sweep", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        cancelled = json.loads(done.stdout)["runs"]
        output = process.communicate(timeout=60)[0]
    assert [row["was"] for row in cancelled] == ["running", "prepared", "prepared"]
    assert [row["state"] for row in cancelled] == ["cancelled"] * 3 == states(tmp_path)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "nothing to cancel" in dtrain("cancel", "sweep", cwd=tmp_path).stdout


def test_one_run_fails_and_the_others_go_on(tmp_path: Path) -> None:
    swept = ("--sweep", "args.misbehave=raise,null,_exit", "--set", "args.rank=0", *NAMED)
    done = dtrain("launch", *swept, TINY, cwd=tmp_path)
    assert done.returncode != 0, done.stdout
    assert states(tmp_path) == ["failed", "succeeded", "failed"]
    assert "sweep-0 (args.misbehave=raise): failed; dtrain why sweep-0" in done.stdout
    (tmp_path / "runs" / "sweep-1").rename(tmp_path / "elsewhere")
    done = dtrain("resume", "sweep", "-q", "--set", "args.misbehave=null", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep-1" in done.stdout.splitlines()[0]  # it is missing
    assert states(tmp_path) == ["succeeded"] * 2


def test_a_run_that_cannot_start_is_told_and_stays(tmp_path: Path) -> None:
    """The directory of one run is damaged between the launch and the resume."""
    swept = ("--sweep", "seed=1..2", *NAMED)
    with started("launch", *swept, *SLOW, "--at-once", "1", TINY, cwd=tmp_path) as process:
        first, second = runs_of(tmp_path, 2)
        until("step 2", lambda: any(line["step"] >= 2 for line in metrics(first)), 60)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    for path in (second.resolved, second.resolved_of(0)):
        path.write_text("name: [\n")
    done = dtrain("resume", "sweep", "--set", "args.pause=0", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert_shown(done.stdout, "yaml.syntax", "sweep-1 (seed=2): not started")
    assert states(tmp_path)[0] == "succeeded"


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (("--sweep", "seed"), "usage.sweep-syntax", ["--sweep seed"]),
        (("--sweep", "no.such=1,2"), "job.unknown-field", ["no"]),
        (("--sweep", "seed=1,x"), "job.wrong-type", ["--sweep seed=x"]),
        (("--sweep", "seed=1,2", "--seed", "3"), "usage.sweep-repeats", ["seed"]),
        (("--sweep", "seed=1,2", "--set", "seed=3"), "usage.sweep-repeats", ["seed"]),
        (("--sweep", "seed=1,2", "--explain"), "usage.flag-without-effect", ["--sweep"]),
        (("--sweep", "seed=1,2", "--detach"), "usage.detach-unsupported", ["local"]),
        (("--sweep", "launch.env.API_KEY=abc,def"), "usage.sweep-secret", ["API_KEY"]),
        (("--at-once", "2"), "usage.flag-without-effect", ["--at-once"]),
        (("--sample", "2"), "usage.flag-without-effect", ["--sample"]),
        (
            (
                "--sweep",
                "seed=1,2",
                "--launcher",
                "torchrun",
                "--nodes",
                "2",
                "--rdzv-endpoint",
                "127.0.0.1:29400",
                "--node-rank",
                "0",
            ),
            "usage.sweep-unsupported",
            ["'torchrun'"],
        ),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], code: str, names: list[str]
) -> None:
    done = dtrain("launch", *arguments, TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert_shown(done.stderr, code, *names)
    assert "abc" not in done.stderr
    assert list_runs(tmp_path / "runs") == []


def test_a_dry_run_lists_the_runs(tmp_path: Path) -> None:
    (tmp_path / "lists.yaml").write_text("- {seed: 1, args.pause: 0.1}\n- {seed: 2}\n")
    dry = ("--sweep-file", "lists.yaml", "--sweep", "args.say=a,b", "--dry-run", *NAMED)
    done = dtrain("launch", *dry, TINY, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "sweep-0: args.say=a, seed=1, args.pause=0.1",
        "sweep-1: args.say=a, seed=2",
        "sweep-2: args.say=b, seed=1, args.pause=0.1",
        "sweep-3: args.say=b, seed=2",
    ]
    assert list_runs(tmp_path / "runs") == []


def test_a_run_id_that_is_in_use(tmp_path: Path) -> None:
    assert dtrain("launch", "-q", "--run-id", "sweep-1", TINY, cwd=tmp_path).returncode == 0
    done = dtrain("launch", "--sweep", "seed=1,2", *NAMED, TINY, cwd=tmp_path)
    assert_shown(done.stderr, "run.exists", "sweep-1")
    assert [run.id for run in list_runs(tmp_path / "runs")] == ["sweep-1"]


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = api.sweep(TINY, {"seed": [1, 2]}, args={"pause": 0.001}, run_id="sweep", progress=False)
    assert [(run.id, run.status()["state"]) for run in runs] == [
        ("sweep-0", "succeeded"),
        ("sweep-1", "succeeded"),
    ]
    with raises("usage.sweep-repeats", "seed"):
        api.sweep(TINY, {"seed": [1, 2]}, seed=3)
