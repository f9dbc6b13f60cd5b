"""Nothing outlives a launch: whatever is killed, no process is left after 5 seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dtrain.run.rundir import RunDir
from support.errors import assert_named
from support.launch import (
    TINY,
    alive,
    descendants,
    dtrain,
    events,
    started,
    the_run,
    wait_for,
    wait_for_step,
    worker_pids,
)

LONG = (
    "launch", "--nodes", "2", "--procs", "2", "--set", "train.steps=100000",
    "--set", "args.pause=0.02", "--set", "data.workers=1", "--set", "launch.stop_timeout=20s", TINY,
)  # fmt: skip


def agent_pid(run: RunDir, node_rank: int) -> int:
    return next(e["pid"] for e in events(run, "agent_started") if e["node_rank"] == node_rank)


def server_pid(run: RunDir) -> int:
    return psutil.Process(agent_pid(run, 0)).ppid()


COLD = ("the command", "the fork server")
"""Killed in a launch that starts as a person's does; the others' is warm."""

WHO: dict[str, Callable[[RunDir, int], int]] = {
    "the command": lambda _run, cli: cli,
    "the fork server": lambda run, _cli: server_pid(run),
    "the head's agent": lambda run, _cli: agent_pid(run, 0),
    "another agent": lambda run, _cli: agent_pid(run, 1),
    "a worker": lambda run, _cli: worker_pids(run)[3],
}


def test_a_node_that_is_asked_while_it_leaves_already_lets_its_workers_save(tmp_path: Path) -> None:
    """Node 1 leaves since node 0 does; a request of its own must not cut that short."""
    with started(*LONG, "--set", "args.pause=1", cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 1)
        os.kill(agent_pid(run, 0), signal.SIGTERM)
        assert wait_for(lambda: ignores(agent_pid(run, 1), signal.SIGTERM), 10)
        os.kill(agent_pid(run, 1), signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    (left,) = events(run, "stopped")
    (saved,) = events(run, "checkpoint_saved")
    assert saved["step"] == left["step"], output


def test_ranks_of_another_node_note_the_signal_that_one_node_was_asked_by(tmp_path: Path) -> None:
    with started(*LONG, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 1)
        os.kill(agent_pid(run, 1), signal.SIGUSR2)
        output = process.communicate(timeout=60)[0]
    (left,) = events(run, "stopped")
    assert (left["rank"], left["reason"]) == (0, "SIGUSR2"), output


def ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) & 1 << number - 1)


@pytest.mark.parametrize(
    "who", [pytest.param(who, marks=pytest.mark.cold if who in COLD else ()) for who in WHO]
)
def test_kill_9_leaves_nothing(tmp_path: Path, who: str) -> None:
    with started(*LONG, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 3)
        below = [psutil.Process(process.pid), *descendants(process.pid)]
        # the command, the fork server, two agents, four workers, each with a loader
        assert len(below) >= 12
        os.kill(WHO[who](run, process.pid), signal.SIGKILL)
        if who == "the command":
            process.wait(5)
        assert wait_for(lambda: not any(map(alive, below)), 5), [p for p in below if alive(p)]
        output, _ = process.communicate(timeout=10)
    assert process.returncode == -9 if who == "the command" else 137
    if who != "the command":
        assert "FAILED: " in output
        assert "killed by SIGKILL" in output
    if who == "the fork server":
        assert "of nodes 0, 1 was" in output
    state = dtrain("status", cwd=tmp_path).stdout
    assert ("lost" if who == "the command" else "failed") in state


STOPPED = {
    "the fork server": "node process",
    "the head's agent": "node agent",
}


@pytest.mark.parametrize("who", STOPPED)
def test_what_is_stopped_is_noticed_while_workers_run(tmp_path: Path, who: str) -> None:
    """SIGSTOP closes no connection, and the workers continue: no process would see a failure."""
    with started(*LONG[:-1], "--set", "launch.lost_after=3s", TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 3)
        below = descendants(process.pid)
        os.kill(WHO[who](run, process.pid), signal.SIGSTOP)
        output = process.communicate(timeout=60)[0]
        assert wait_for(lambda: not any(map(alive, below)), 5), [p for p in below if alive(p)]
    assert process.returncode != 0
    (headline,) = [line for line in output.splitlines() if line.startswith("FAILED: node ")]
    assert_named(headline, [STOPPED[who], " 3 s", "[failure.node-lost]"])
    assert who == "the fork server" or headline.startswith("FAILED: node 0 (node-0)")


def test_ctrl_c_ends_the_run_and_its_directory_is_named(tmp_path: Path) -> None:
    with started(*LONG, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 3)
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert not any(map(alive, below))
    assert process.returncode == 130
    assert "Traceback" not in output
    assert_named(output, ["stopped by SIGINT", str(run.path), f"dtrain resume {run.id}"])
    assert events(run, "stopped")
    assert list(run.checkpoints.iterdir()), "the workers left without saving"
    assert "cancelled" in dtrain("status", cwd=tmp_path).stdout


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    """A worker that does not leave when asked is not waited for any longer."""
    hang = ("--set", "args.misbehave=hang", "--set", "args.at=3", "--set", "args.rank=0")
    with started(*LONG[:-1], *hang, TINY, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 1)
        below = descendants(process.pid)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert wait_for(lambda: process.poll() is not None, 1.0) or process.poll() is None
        output, _ = process.communicate(timeout=15)
        assert wait_for(lambda: not any(map(alive, below)), 5)
    assert process.returncode == 130
    assert "press Ctrl-C again to kill the workers now" in output


def test_cancel_from_another_terminal(tmp_path: Path) -> None:
    with started(*LONG, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 2)
        below = descendants(process.pid)
        done = dtrain("cancel", run.id[:6], cwd=tmp_path)
        assert done.stdout == f"{run.id}: cancelled\n"
        process.communicate(timeout=10)
        assert not any(map(alive, below))
    assert process.returncode == 143
    again = dtrain("cancel", "last", cwd=tmp_path)
    assert (
        again.stdout == f"{the_run(tmp_path).id} has already ended (cancelled); nothing to cancel\n"
    )


@pytest.mark.cold
def test_ctrl_c_during_the_imports_does_not_wait_for_them(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        "import pathlib, threading\npathlib.Path('importing').touch()\nthreading.Event().wait()\n"
    )
    slow = ("--set", "launch.preload=[endless]", "--set", "launch.stop_timeout=600s", TINY)
    with started("launch", "--procs", "2", *slow, cwd=tmp_path,
                 env={"PYTHONPATH": str(tmp_path)}) as process:  # fmt: skip
        assert wait_for((tmp_path / "importing").exists, 90)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    run = the_run(tmp_path)
    assert events(run, "agent_started")
    assert not events(run, "workers_started")
    assert "Traceback" not in run.host_log(0, 0).read_text()


@pytest.mark.cold
def test_ctrl_c_before_anything_has_begun_is_no_traceback(tmp_path: Path) -> None:
    """Of our imports click is the first that takes long; here it is where Ctrl-C comes."""
    (tmp_path / "click.py").write_text("import os; os.kill(os.getpid(), 2); print('went on')\n")
    done = dtrain("launch", TINY, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
