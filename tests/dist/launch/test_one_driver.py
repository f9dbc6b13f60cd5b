"""One command drives a run; whoever comes second is refused, and changes nothing."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dtrain.ports import free_candidate
from dtrain.run.attempts import Handle, Result
from dtrain.run.rundir import RunDir
from support.launch import TINY, dtrain, events, metrics, started, the_run, until, wait_for

GAPS_S = (0.0, 0.004, 0.03, 0.15)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of one process that has done 3 steps."""
    steps = ("--set", "train.steps=3", "--set", "checkpoint.every_steps=1")
    done = dtrain("launch", *steps, TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return the_run(tmp_path)


def check_one_of(
    run: RunDir, commands: list[subprocess.Popen[str]], attempt: int, more_steps: int = 2
) -> None:
    """See that one of several commands trains, and that the others are refused; end that one."""
    assert wait_for(lambda: sum(each.poll() is None for each in commands) <= 1, 30)
    refused = [each for each in commands if each.poll() is not None]
    (driver,) = [each for each in commands if each not in refused]
    for each in refused:
        output = each.communicate()[0]
        assert each.returncode == 2, output
        assert f"run {run.id} is held by process {driver.pid} on" in output
    reached = metrics(run)[-1]["step"]
    until("further steps", lambda: metrics(run)[-1]["step"] >= reached + more_steps)
    assert Result.read(run, attempt) is None
    handle = Handle.read(run)
    assert handle is not None
    assert (handle.attempt, handle.pid) == (attempt, driver.pid)
    cancelled = dtrain("cancel", run.id, cwd=run.path.parents[1])
    assert cancelled.stdout == f"{run.id}: cancelled\n"
    driver.communicate(timeout=30)


def test_of_resumes_at_once_one_trains(run: RunDir) -> None:
    """The gaps are those at which both found the run free, as long as nothing was claimed."""
    resume = ("resume", run.id, "--set", "train.steps=900", "--set", "args.pause=0.05")
    with ExitStack() as stack:
        commands = []
        for gap_s in GAPS_S:
            commands.append(stack.enter_context(started(*resume, cwd=run.path.parents[1])))
            time.sleep(gap_s)  # what is tried here is the gap
        check_one_of(run, commands, attempt=1)
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)), "two have trained"
    assert [event["state"] for event in events(run, "ended")] == ["succeeded", "cancelled"]


def test_of_resumes_after_the_driver_was_killed_one_trains(run: RunDir) -> None:
    resume = ("resume", run.id, "--set", "train.steps=900", "--set", "args.pause=0.05")
    folder = run.path.parents[1]
    with started(*resume, cwd=folder) as killed:
        until("a step", lambda: metrics(run)[-1]["step"] > 4)
        killed.kill()
        killed.communicate(timeout=10)
    with ExitStack() as stack:
        commands = [stack.enter_context(started(*resume, cwd=folder)) for _ in range(3)]
        looks = [stack.enter_context(started("status", run.id, cwd=folder)) for _ in range(2)]
        assert [look.wait(30) for look in looks] == [0, 0]
        check_one_of(run, commands, attempt=2)
    lost = Result.read(run, 1)
    assert lost is not None
    assert lost.state == "lost"
    assert dtrain("status", run.id, cwd=folder).stdout.count("cancelled") == 1


def test_a_launch_of_a_run_that_goes_on_is_refused(tmp_path: Path) -> None:
    launch = ("launch", "--run-id", "one", "--set", "args.pause=0.05", "--set", "train.steps=900")
    with started(*launch, TINY, cwd=tmp_path) as first:
        until("a step", lambda: metrics(RunDir(tmp_path / "runs" / "one")))
        with started(*launch, TINY, cwd=tmp_path) as second:
            check_one_of(RunDir(tmp_path / "runs" / "one"), [first, second], attempt=0)


def test_a_second_command_for_a_node_is_refused(tmp_path: Path) -> None:
    port = free_candidate("127.0.0.1", str(tmp_path))
    launch = (
        "launch", "--launcher", "torchrun", "--nodes", "2", "--run-id", "one",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--set", "args.pause=0.05",
        "--set", "train.steps=900",
    )  # fmt: skip
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(started(*launch, "--node-rank", str(k), TINY, cwd=tmp_path))
            for k in range(2)
        ]
        run = RunDir(tmp_path / "runs" / "one")
        until("a step", lambda: metrics(run), 60)
        for k in range(2):
            with started(*launch, "--node-rank", str(k), TINY, cwd=tmp_path) as again:
                output = again.communicate(timeout=30)[0]
                assert again.returncode == 2, output
                assert f"is held by process {nodes[k].pid} on" in output
        reached = metrics(run)[-1]["step"]
        until("further steps", lambda: metrics(run)[-1]["step"] > reached + 2)
        assert dtrain("cancel", "one", cwd=tmp_path).returncode == 0
        for node in nodes:
            node.communicate(timeout=30)
