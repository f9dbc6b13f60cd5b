"""`dtrain doctor` before a launch, its checks in one, and in the verdict of one that failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dtrain import ports
from dtrain.doctor.checks import ALONE_CHECKS, HOST_CHECKS
from dtrain.run.failures import FailureRecord
from support import JOBS
from support.errors import assert_shown
from support.launch import TINY, dtrain, events, started, the_run


def checks(cwd: Path, *arguments: str | Path, code: int) -> dict[str, dict[str, Any]]:
    """What `dtrain doctor --json` prints, by check."""
    done = dtrain("doctor", "--json", *arguments, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    shown = json.loads(done.stdout)
    assert (shown["status"] == "problem") == bool(code)
    return {each["check"]: each for each in shown["checks"]}


def test_this_host(tmp_path: Path) -> None:
    found = checks(tmp_path, code=0)
    assert [*found] == [*HOST_CHECKS, *ALONE_CHECKS, "torch"]
    assert all(bool(each["code"]) == (each["status"] != "ok") for each in found.values())
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_a_job_and_what_it_asks_of_this_host(tmp_path: Path) -> None:
    done = dtrain("doctor", "--procs", "64", "--set", "data.workers=3", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok       plan ")
    (cores,) = (line for line in lines if line.startswith("warning  cores"))
    assert "64 ranks × 1 thread and 192 loader processes" in cores
    assert any(line.startswith("ok       task      task.py:Tiny") for line in lines)
    assert "warning" in lines[-1]


@pytest.mark.parametrize(
    ("code", "fact", "remedy"),
    [
        ("x = 1\ny = 1 / 0\n", "task.py:2: ZeroDivisionError", "this line"),
        ("import os\nos._exit(0)\n", "task.py:Tiny ended with code 0", "remove"),
    ],
)
def test_a_task_that_cannot_be_imported(code: str, fact: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(f"{code}class Tiny:\n    pass\n")
    shutil.copy(TINY, tmp_path / "job.yaml")
    found = checks(tmp_path, "job.yaml", code=1)
    (problem,) = (each for each in found.values() if each["status"] == "problem")
    assert problem["code"] == "doctor.task"
    assert fact in problem["fact"]
    assert remedy in problem["remedy"]


def test_what_a_plan_finds_is_found_too(tmp_path: Path) -> None:
    found = checks(tmp_path, "--strategy", "ddpp", TINY, code=1)
    assert found["plan"]["code"] == "job.unknown-name"
    assert {*found} >= {*HOST_CHECKS}
    few = checks(tmp_path, "--gpus", "99", TINY, code=1)
    assert {name for name, each in few.items() if each["status"] == "problem"} == {"plan", "gpus"}
    done = dtrain("doctor", "--no-such-flag", cwd=tmp_path)
    assert_shown(done.stderr, "usage.unknown-option", "--no-such-flag")
    done = dtrain("doctor", "--launcher", "nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere" in done.stdout


def test_a_checkpoint_of_an_earlier_run_tells_the_size(tmp_path: Path) -> None:
    done = dtrain("launch", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "a checkpoint takes " in checks(tmp_path, TINY, code=0)["disk"]["fact"]


def test_nodes_check_themselves_and_one_another(tmp_path: Path) -> None:
    done = dtrain("launch", "--preflight", "--nodes", "2", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(tmp_path)
    found = events(run, "preflight")
    names = [each["check"] for each in found]
    assert {*names} == {*HOST_CHECKS, "task", "code", "shared", "ports", "clock"}
    assert {each["status"] for each in found} <= {"ok", "warning"}
    assert [line.split()[1] for line in done.stdout.splitlines() if "; on all nodes" in line]
    in_order = [each["event"] for each in events(run)]
    last = len(in_order) - 1 - in_order[::-1].index("preflight")
    assert last < in_order.index("workers_started")
    assert max(each["time"] for each in found) - events(run, "agent_started")[0]["time"] < 10


def test_the_node_with_a_problem_is_named_and_no_worker_starts(tmp_path: Path) -> None:
    """One command a node, as on two hosts; the second has a variable of another cluster."""
    port = ports.free_candidate("127.0.0.1", str(tmp_path))
    arguments = (
        "launch", "--preflight", "--launcher", "torchrun", "--nodes", "2", "--run-id", "unlike",
        "--rdzv-endpoint", f"127.0.0.1:{port}", TINY,
    )  # fmt: skip
    with ExitStack() as stack:
        both = [
            stack.enter_context(started(*arguments, "--node-rank", rank, cwd=tmp_path, env=env))
            for rank, env in (("0", {}), ("1", {"NCCL_SOCKET_IFNAME": "ib7"}))
        ]
        outputs = [process.communicate(timeout=90)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], outputs
    for output in outputs:
        (head,) = (line for line in output.splitlines() if line.startswith("FAILED: "))
        assert head.startswith("FAILED: node 1 (")
        assert head.endswith("[doctor.interface]")
        assert "unset NCCL_SOCKET_IFNAME" in output
    run = the_run(tmp_path)
    assert not run.rank_logs(0)
    record = FailureRecord.read(run.node_failure(0, 1))
    assert record is not None
    assert (record.node_rank, record.code) == (1, "doctor.interface")
    assert not run.node_failure(0, 0).exists()
    why = dtrain("why", "unlike", "--json", cwd=tmp_path)
    assert json.loads(why.stdout)["code"] == "doctor.interface"


def with_shared_memory(size: str, cwd: Path, *arguments: str | Path) -> str:
    """The output of a launch that must fail, on a host with so little in /dev/shm."""
    if os.geteuid() != 0:
        pytest.skip("another /dev/shm needs root")
    small = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = [sys.executable, "-P", "-m", "dtrain", "launch", *map(str, arguments)]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", small, "sh", *command],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.cold
def test_a_loader_process_without_shared_memory_is_explained(tmp_path: Path) -> None:
    """4 kB is too little for torch's own locks; a run of `--preflight` does not come so far."""
    job = JOBS / "loaders" / "job.yaml"
    output = with_shared_memory("4k", tmp_path, job)
    (advice,) = (line for line in output.splitlines() if line.startswith("  try: "))
    assert "/dev/shm, which on " in advice
    assert " of 4.1 kB now" in advice
    output = with_shared_memory("4k", tmp_path, "--preflight", job)
    assert "[doctor.shm]" in output
    assert "raised" not in output


def test_a_head_whose_name_is_not_known_is_explained(tmp_path: Path) -> None:
    done = dtrain(
        "launch", "--launcher", "torchrun", "--nodes", "2", "--node-rank", "1", "--run-id", "lost",
        "--rdzv-endpoint", "no-such-head.invalid:29400", "--set", "launch.join_timeout=1s", TINY,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "getent hosts no-such-head.invalid" in done.stdout
