"""What Slurm's commands say, read; texts as Slurm 22.05 printed them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from dtrain.launchers.slurm import queue
from dtrain.launchers.slurm.queue import Job, Unreachable, Watcher, parse_accounting, parse_queue
from dtrain.node.placement.slurm import expand_nodelist, own_address

QUEUE = """\
6|COMPLETED|None|n0|0|0|
1|FAILED|NonZeroExitCode|n0|768|0|
7|FAILED|BadConstraints||1|0|
3|PENDING|PartitionNodeLimit||0|0|
4|PENDING|Resources||0|2|
2|RUNNING|None|n[0-1]|0|0|
9|CANCELLED|None|n[0-1]|15|0|
"""
ACCOUNTING = """\
1|COMPLETED|0:0|n0
2|FAILED|3:0|n[0-1]
3|CANCELLED by 0|0:0|None assigned
4|NODE_FAIL|1:0|n1
5|OUT_OF_MEMORY|0:125|n2
6|TIMEOUT|0:0|n2
"""


def test_the_queue_is_read() -> None:
    jobs = parse_queue(QUEUE)
    assert jobs["1"] == Job("1", "FAILED", "NonZeroExitCode", "n0", 3)
    assert jobs["2"] == Job("2", "RUNNING", "None", "n[0-1]")
    assert (jobs["4"].restarts, jobs["9"].exit_code) == (2, 128 + 15)
    over = {job_id for job_id, job in jobs.items() if job.is_over}
    assert over == {"6", "1", "7", "9"}
    assert parse_queue("") == parse_queue("slurm_load_jobs error: Invalid job id specified") == {}


def test_accounting_is_read() -> None:
    jobs = parse_accounting(ACCOUNTING)
    assert jobs["3"] == Job("3", "CANCELLED")
    assert (jobs["2"].exit_code, jobs["5"].exit_code) == (3, 128 + 125)
    assert all(job.is_over for job in jobs.values())


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (
            Job("4", "PENDING", "Resources"),
            "job 4 pending: waiting for nodes to become free (Resources)",
        ),
        (Job("4", "PENDING", "Nonsense"), "job 4 pending: Nonsense"),
        (
            Job("4", "PENDING", "PartitionTimeLimit"),
            "job 4 pending: the time limit is above that of the partition (PartitionTimeLimit)",
        ),
        (Job("4", "RUNNING", nodes="n[0-1]"), "job 4 running on n[0-1]"),
        (Job("4", "NODE_FAIL", nodes="n1"), "job 4 node fail"),
        (Job("4", "GONE"), "job 4 is no longer known to Slurm"),
    ],
)  # fmt: skip
def test_words(job: Job, words: str) -> None:
    assert job.description == words


Answer = Callable[..., "subprocess.CompletedProcess[str]"]


def answering(calls: list[tuple[str, ...]], **outputs: str | None) -> Answer:
    """Instead of Slurm's commands: texts by name, None for one that fails."""

    def ask(*argv: str, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(argv)
        text = outputs.get(argv[0])
        failed = text is None
        stderr = "Unable to contact slurm controller (connect failure)" if failed else ""
        return subprocess.CompletedProcess(argv, int(failed), text or "", stderr)

    return ask


def test_one_call_for_many_jobs_and_none_of_sacct(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(queue, "run_command", answering(calls, squeue=QUEUE))
    assert set(queue.query(["1", "2", "3"])) == {"1", "2", "3", "4", "6", "7", "9"}
    assert [argv[0] for argv in calls] == ["squeue"]


def test_what_squeue_has_forgotten_is_asked_of_sacct(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(queue.shutil, "which", lambda name: name)
    monkeypatch.setattr(queue, "run_command", answering(calls, squeue="", sacct=ACCOUNTING))
    assert queue.query(["2"])["2"].exit_code == 3
    monkeypatch.setattr(queue, "run_command", answering(calls, squeue="", sacct=None))
    assert queue.query(["2"])["2"].state == "GONE"


def test_a_controller_that_is_away_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(queue, "run_command", answering(calls, squeue=QUEUE))
    watcher = Watcher()
    assert watcher.job("2").state == "RUNNING"
    monkeypatch.setattr(queue, "run_command", answering(calls, squeue=None))
    monkeypatch.setattr(queue, "_MIN_PAUSE_S", 0.0)
    assert watcher.job("2", now=True).state == "RUNNING"
    assert "Unable to contact" in str(watcher.error)
    with pytest.raises(Unreachable):
        queue.query(["2"])


def test_it_asks_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    clock = [0.0]
    monkeypatch.setattr(queue.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(queue, "run_command", answering(calls, squeue=QUEUE))
    watcher = Watcher()
    for tenth in range(36000):
        clock[0] = 1000 + tenth / 10
        watcher.job("2")
    assert 3600 / 15 <= len(calls) < 3600 / 15 + 30  # an hour


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n0", ["n0"]),
        ("n[0-2]", ["n0", "n1", "n2"]),
        ("gpu[1,03-05]-ib,login", ["gpu1-ib", "gpu03-ib", "gpu04-ib", "gpu05-ib", "login"]),
        ("127.0.0.[2-3]", ["127.0.0.2", "127.0.0.3"]),
        ("r[1-2]n[8-9]", ["r1n8", "r1n9", "r2n8", "r2n9"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists(nodelist: str, names: list[str]) -> None:
    assert list(expand_nodelist(nodelist)) == names


def test_the_heads_address_is_not_that_of_its_own_name() -> None:
    assert own_address(("anything",), None) == "127.0.0.1"
    assert own_address(("127.0.0.2", "127.0.0.3"), None).startswith("127.")
