"""Workers that fail are started again, on all nodes, every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.errors import assert_named
from support.launch import TINY, dtrain, events, metrics, the_run

TWO_BY_TWO = ("launch", "--nodes", "2", "--procs", "2")


def test_20_of_20_recoveries_on_two_nodes(tmp_path: Path) -> None:
    """Every rank 3 of every start but the last is killed at its first step."""
    done = dtrain(
        *TWO_BY_TWO, "--max-restarts", "20", "--set", "args.rank=3", "--set", "args.at=1",
        "--set", "args.misbehave=kill", "--set", "args.times=20",
        "--set", f"args.once={tmp_path / 'count'}", TINY, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(tmp_path)
    starts = [event["restart"] for event in events(run, "workers_started")]
    assert sorted(starts) == sorted([*range(21), *range(21)])
    assert [line["step"] for line in metrics(run)][-1] == 12
    shown = [line for line in done.stdout.splitlines() if "failed" in line]
    assert len(shown) == 20
    for number, line in enumerate(shown, 1):
        assert_named(line, ["rank 3 on node-1", "SIGKILL", f"restart {number} of 20"])


@pytest.mark.parametrize("misbehave", ["raise", "kill"])
def test_a_restart_resumes_from_the_checkpoint(tmp_path: Path, misbehave: str) -> None:
    done = dtrain(
        *TWO_BY_TWO, "--max-restarts", "1", "--set", f"args.misbehave={misbehave}",
        "--set", "args.at=8", "--set", "checkpoint.every_steps=3",
        "--set", f"args.once={tmp_path / 'once'}", TINY, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(tmp_path)
    steps = [line["step"] for line in metrics(run)]
    assert steps == [*range(1, 8), *range(7, 13)]  # step 6 was saved, 7 is done again
    (resumed,) = events(run, "resumed")
    assert resumed["step"] == 6
    straight = dtrain(*TWO_BY_TWO, "--runs", "straight", TINY, cwd=tmp_path)
    assert straight.returncode == 0
    assert sha(tmp_path / "runs") == sha(tmp_path / "straight")


def test_when_restarts_are_used_up_the_run_fails(tmp_path: Path) -> None:
    done = dtrain(
        *TWO_BY_TWO, "--max-restarts", "2", "--set", "args.misbehave=kill", TINY, cwd=tmp_path
    )
    assert done.returncode == 137
    assert "restarts: 2, all that were allowed" in done.stdout
    run = the_run(tmp_path)
    assert max(event["restart"] for event in events(run, "workers_started")) == 2


def test_the_same_failure_is_not_restarted_for_ever(tmp_path: Path) -> None:
    """Workers that are killed, or fail in another step, are; see the recoveries above."""
    done = dtrain(
        *TWO_BY_TWO, "--max-restarts", "6", "--set", "args.misbehave=raise", "--set", "args.at=8",
        TINY, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "restarts: 1; it had failed in the same way in step 8 before" in done.stdout
    run = the_run(tmp_path)
    assert max(event["restart"] for event in events(run, "workers_started")) == 1


def sha(runs: Path) -> str:
    import json

    (events_file,) = runs.glob("*/events.jsonl")
    lines = [json.loads(line) for line in events_file.read_text().splitlines()]
    (finished,) = [line for line in lines if line["event"] == "finished"]
    digest: str = finished["parameters_sha256"]
    return digest
