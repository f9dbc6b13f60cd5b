"""A run that says nothing for a while is told once, with where its ranks are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.node import stack_dump
from dtrain.node.silence import SilenceWatcher, describe_locations
from dtrain.procs import fork_child
from dtrain.run import progress_bars
from dtrain.run.failures import Frame
from support.launch import until


def waits(ready: int, answers: bool) -> int:
    if answers:
        stack_dump.enable_to_memory()
    os.write(ready, b"x")
    while True:
        time.sleep(60)


@pytest.fixture
def ranks() -> Iterator[dict[int, int]]:
    """pid → rank of two processes, of which one answers."""
    heard, ready = os.pipe()
    made = {
        fork_child(lambda answers=rank == 0: waits(ready, answers), keep_fds=[ready]): rank
        for rank in (0, 1)
    }
    for _ in made:
        os.read(heard, 1)
    yield made
    for pid in made:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(heard)
    os.close(ready)


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    spec = JobSpec.model_validate(
        {"name": "j", "script": "t.py", "launch": {"procs_per_node": 2, "collective_timeout": 0.1}}
    )
    facts = Facts("r", str(tmp_path), "python", "host", cores=2, free_port=16000)
    return make_plan(
        spec, job_dir="/", launcher="local", profile="local", options=AnyOptions(), facts=facts
    )


def test_silence_is_told_once_until_something_is_said(
    plan: LaunchPlan, ranks: dict[int, int]
) -> None:
    logs = {rank: plan.run.rank_log(0, 0, rank) for rank in (0, 1)}
    logs[0].parent.mkdir(parents=True)
    logs[0].write_text("begins\n")
    told: list[tuple[str, dict[str, Any]]] = []
    silence = SilenceWatcher(plan, logs)

    def send(pids: Iterable[int], number: int) -> None:
        for pid in pids:
            os.kill(pid, number)

    def watched(count: int) -> bool:
        silence.watch(ranks, send, lambda kind, **fields: told.append((kind, fields)))
        return len(told) == count

    until("silence", lambda: watched(1))
    what = told[0][1]["what"]
    assert "no output and no metric for 0.05 s: rank 0 at node/test_silence.py:" in what
    assert " in waits: " in what
    assert what.endswith("; rank 1 without an answer")
    assert logs[0].read_text() == "begins\n", "no log shows that it was asked"
    logs[1].write_text("goes on\n")
    until("the end of it", lambda: watched(2))
    until("silence again", lambda: watched(3))
    assert [kind for kind, _ in told] == ["silent", "heard", "silent"]
    assert "for 0.1 s: " in told[2][1]["what"], "twice as long, for it has gone on by itself"
    assert not any(os.waitpid(pid, os.WNOHANG)[0] for pid in ranks), "nobody was killed by it"


def test_a_node_that_does_not_see_rank_0_says_nothing(plan: LaunchPlan) -> None:
    silence, told = SilenceWatcher(plan, {}), []
    end = time.monotonic() + 0.2
    until(
        "four times the patience",
        lambda: (
            silence.watch({}, lambda *_: None, lambda kind, **_: told.append(kind))
            or time.monotonic() > end
        ),
    )
    assert told == []


def test_a_progress_bar_that_moves_is_output(plan: LaunchPlan) -> None:
    log = plan.run.rank_log(0, 0, 0)
    log.parent.mkdir(parents=True)
    log.write_text("begins\n")
    bar = progress_bars.live_file(log)
    bar.write_text(" 10%")
    silence, told = SilenceWatcher(plan, {0: log}), list[str]()

    def watched(count: int) -> bool:
        silence.watch({}, lambda *_: None, lambda kind, **_: told.append(kind))
        return len(told) == count

    until("silence", lambda: watched(1))
    bar.write_text(" 20%")  # as long as before
    until("the end of it", lambda: watched(2))
    assert told == ["silent", "heard"]


def test_a_rank_that_runs_a_command_is_there() -> None:
    stack = [Frame("lib/subprocess.py", 5, "wait", ""), Frame("x.py", 7, "run_command", "")]
    assert describe_locations({0: stack, 1: stack}) == "ranks 0, 1 in the command"
