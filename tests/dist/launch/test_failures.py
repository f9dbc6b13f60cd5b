"""What fails is named: rank, node, its own error, in at most 15 lines, with its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.run.verdict import MAX_LINES
from support.errors import assert_named, assert_shown
from support.launch import (
    TINY,
    dtrain,
    events,
    metrics,
    started,
    the_run,
    wait_for,
    wait_for_step,
    worker_pids,
)

TWO_BY_TWO = ("launch", "--nodes", "2", "--procs", "2")


def block(output: str) -> list[str]:
    """The verdict in what a launch printed."""
    lines = output.splitlines()
    (start,) = [index for index, line in enumerate(lines) if line.startswith("FAILED: ")]
    return lines[start:]


@pytest.mark.parametrize(
    ("misbehave", "headline", "code"),
    [
        ("raise", "rank 3 on node 1 (node-1) raised ValueError", 1),
        ("kill", "rank 3 on node 1 (node-1): killed by SIGKILL", 137),
        ("segv", "rank 3 on node 1 (node-1): killed by SIGSEGV", 139),
        ("exit", "rank 3 on node 1 (node-1): sys.exit(3)", 3),
        ("_exit", "rank 3 on node 1 (node-1): exited with code 3", 3),
        ("leave", "rank 3 on node 1 (node-1) exited early, by sys.exit(0) in step 3: ", 1),
        ("_leave", "rank 3 on node 1 (node-1) exited early, by os._exit(0): ", 1),
    ],
)
def test_the_culprit_is_named(tmp_path: Path, misbehave: str, headline: str, code: int) -> None:
    done = dtrain(
        *TWO_BY_TWO, "--set", f"args.misbehave={misbehave}", "--set", "args.rank=3", TINY,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = block(done.stdout)
    assert lines[0].startswith(f"FAILED: {headline}")
    assert len(lines) <= MAX_LINES
    run = the_run(tmp_path)
    assert any(line.strip().startswith("log: ") and "rank-00003.log" in line for line in lines)
    if misbehave == "kill":
        assert any(
            re.search(r"the rank had 0\.\d GB at most, the node has", each) for each in lines
        )
    if "leave" in misbehave:
        assert any("task.py" in line and "in _misbehave" in line for line in lines)
    if misbehave == "raise":
        assert "  rank 3 does not like this batch" in lines
        assert any("task.py" in line and "in _misbehave" in line for line in lines)
        assert "Traceback" in run.rank_log(0, 1, 3).read_text()
    why = dtrain("why", cwd=tmp_path)
    assert why.stdout.splitlines() == lines
    told = json.loads(dtrain("why", "last", "--json", cwd=tmp_path).stdout)
    assert told["culprit"]["rank"] == 3
    assert told["exit_code"] == code
    status = json.loads(dtrain("status", "--json", cwd=tmp_path).stdout)
    assert (status["state"], status["exit_code"]) == ("failed", code)


def test_a_run_that_a_worker_left_is_not_finished_and_can_be_resumed(tmp_path: Path) -> None:
    arguments = ("--set", "args.misbehave=term", "--set", "args.once=asked", TINY)
    done = dtrain("launch", "--procs", "2", *arguments, cwd=tmp_path)
    assert done.returncode == 128 + 15, done.stdout + done.stderr
    run = the_run(tmp_path)
    (left,) = events(run, "stopped")
    assert 3 <= left["step"] < 12
    names = [run.id, "SIGTERM", "rank 1 ", f"step {left['step']}\n", f"dtrain resume {run.id}\n"]
    assert_named(done.stdout, names)
    assert_named(dtrain("why", cwd=tmp_path).stdout, names[:-1])
    status = json.loads(dtrain("status", "--json", cwd=tmp_path).stdout)
    assert (status["state"], status["exit_code"]) == ("cancelled", 143)
    done = dtrain("resume", "--set", "train.steps=2", cwd=tmp_path)
    assert done.returncode == 2
    assert_shown(done.stderr, "run.end-passed", f"step {left['step']}", "train.steps=2")
    done = dtrain("resume", "--set", "seed=5", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_named(done.stdout, ["[checkpoint.none-loads]", "seed was 0, is 5", "--set seed=0"])
    done = dtrain("resume", cwd=tmp_path)  # as it was before the one that was refused
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step["step"] for step in metrics(run)] == list(range(1, 13))


def test_a_rank_that_hangs_is_named_and_not_who_waited_for_it(tmp_path: Path) -> None:
    """On another node, which hears only that the head has given up."""
    done = dtrain(
        "launch", "--nodes", "2", "--set", "args.misbehave=hang",
        "--set", "launch.collective_timeout=10s", TINY, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    lines = block(done.stdout)
    assert lines[0].startswith("FAILED: rank 1 on node 1 (node-1) ")
    assert lines[0].endswith("(10 s)  [failure.rank-absent]")
    assert len(lines) <= MAX_LINES
    assert any("task.py" in line and "in wait_forever" in line for line in lines)
    assert "  rank 0 failed as a consequence" in lines
    assert any(line.strip().startswith("log: ") and "rank-00001.log" in line for line in lines)


def memory_cgroup() -> Path | None:
    """A place where this process may make memory cgroups."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        probe = root / f"dtrain-probe-{os.getpid()}"
        try:
            probe.mkdir()
        except OSError:
            continue
        limits = [n for n in ("memory.limit_in_bytes", "memory.max") if (probe / n).exists()]
        probe.rmdir()
        if limits:
            return root
    return None


@pytest.mark.skipif(memory_cgroup() is None, reason="no right to make a memory cgroup here")
def test_a_rank_that_the_kernel_killed_for_memory_is_told_so(tmp_path: Path) -> None:
    root = memory_cgroup()
    assert root is not None
    group = root / f"dtrain-test-{os.getpid()}"
    group.mkdir()
    try:
        limit = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / limit).write_text(str(1536 << 20))
        enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')"
        arguments = [
            "launch", "--procs", "2", "--runs", "runs",
            "--set", "args.misbehave=memory", "--set", "args.rank=1", str(TINY),
        ]  # fmt: skip
        code = f"{enter}\nfrom dtrain.cli.main import main\nmain({arguments!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 137, done.stdout + done.stderr
        lines = block(done.stdout)
        assert lines[0].endswith("  [failure.out-of-memory]")
        assert lines[0].startswith("FAILED: rank 1 on node 0")
        (advice,) = [line for line in lines if "ask for more memory" in line]
        assert re.search(r"the rank had 1\.[0-6] GB at most, .* the limit here is 1\.6 GB", advice)
    finally:
        assert wait_for(lambda: not (group / "cgroup.procs").read_text().strip(), 10)
        group.rmdir()


def test_a_node_that_never_joins_is_named_before_the_timeout(tmp_path: Path) -> None:
    arguments = (
        "launch", "--launcher", "torchrun", "--nodes", "2", "--node-rank", "0", "--run-id", "lone",
        "--rdzv-endpoint", "127.0.0.1:18231", "--set", "launch.join_timeout=8s", TINY,
    )  # fmt: skip
    with started(*arguments, cwd=tmp_path) as process:
        assert wait_for(lambda: (tmp_path / "runs/lone/resolved.yaml").exists(), 30)
        run = the_run(tmp_path)
        waiting = wait_for(lambda: events(run, "waiting"), 30)
        assert waiting
        assert process.poll() is None, "named only after the end"
        assert "waiting for node 1" in waiting[0]["what"]
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1/2 nodes joined" in output
    lines = block(output)
    assert lines[0].startswith("FAILED: node 1: node 1 ")
    assert "did not join: 1 of 2 nodes after 8 s" in lines[0]


def test_a_node_that_is_killed_is_named(tmp_path: Path) -> None:
    """Seldom the ranks that are left wait for each other in gloo, up to the timeout."""
    settings = ("args.pause=0.05", "train.steps=4000", "launch.collective_timeout=15s")
    flags = [part for each in settings for part in ("--set", each)]
    with started(*TWO_BY_TWO, *flags, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 2)
        agents = events(run, "agent_started")
        pid = next(event["pid"] for event in agents if event["node_rank"] == 1)
        workers = worker_pids(run)
        os.kill(pid, 9)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 137
    headline = block(output)[0]
    assert headline.startswith("FAILED: node 1 (node-1): ")
    assert headline.endswith("SIGKILL  [failure.node-lost]")
    assert len(workers) == 4


def test_a_busy_port_is_not_the_users_problem(tmp_path: Path) -> None:
    """The first candidate is taken: the next one is found, and recorded."""
    from dtrain import ports

    first = next(ports.candidates("busy-run/0"))
    with ports.listen("127.0.0.1", first):
        done = dtrain("launch", "--run-id", "busy-run", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(the_run(tmp_path).plan.read_text())
    assert plan["rdzv_port"] != first


def test_a_busy_endpoint_of_the_users_is_named(tmp_path: Path) -> None:
    from dtrain import ports

    with ports.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = dtrain(
            "launch", "--launcher", "torchrun", "--rdzv-endpoint", f"127.0.0.1:{port}", TINY,
            cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 1
    assert_shown(done.stderr, "launch.port-not-opened", f"port {port} ", "--rdzv-endpoint")


def test_an_unwritable_run_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = dtrain("launch", "--runs", "file/runs", TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert_shown(done.stderr, "launch.not-writable", "file/runs", "--runs DIR")


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "dtrain-test", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named(tmp_path: Path, small_disk: Path) -> None:
    """No metrics are written, so that it is a checkpoint that finds no room and not a line."""
    with started(
        "launch", "--procs", "2", "--runs", small_disk / "runs", "--set", "train.steps=100000",
        "--set", "args.pause=0.01", "--set", "checkpoint.every_steps=20",
        "--set", "log.every_steps=100000", TINY, cwd=tmp_path,
    ) as process:  # fmt: skip
        assert wait_for(lambda: list(small_disk.glob("runs/*/checkpoints/step-*")), 60)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    text = "\n".join(block(output))
    assert "raised CheckpointError" in text
    assert "No space left on device" in text
    assert "FAILED: rank 0 on node 0" in text
    assert len(block(output)) <= MAX_LINES


def test_a_module_that_cannot_be_preloaded_is_named(tmp_path: Path) -> None:
    done = dtrain("launch", "--set", "launch.preload=[no_such_module]", TINY, cwd=tmp_path)
    assert done.returncode == 1
    lines = block(done.stdout)
    assert "No module named 'no_such_module'" in "\n".join(lines)


def test_a_breakpoint_says_that_there_is_no_terminal_and_its_way_to_one_works(
    tmp_path: Path,
) -> None:
    code = (TINY.parent / "task.py").read_text()
    code = code.replace("return nn.Linear(4, 1)", "breakpoint()\n        return nn.Linear(4, 1)")
    (tmp_path / "task.py").write_text(code)
    (tmp_path / "job.yaml").write_text(TINY.read_text())
    done = dtrain("launch", "--procs", "2", "job.yaml", cwd=tmp_path)
    assert done.returncode == 1
    lines = block(done.stdout)
    assert any("task.py" in line and "in model" in line for line in lines)
    (advice,) = [line for line in lines if line.startswith("  try: ")]
    write, worker = advice.split("`")[1::2]
    planned = dtrain(*write.replace("JOB", "job.yaml").split()[1:], cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    typed, terminal = os.openpty()
    os.write(typed, b"p 6 * 7\ncontinue\n")
    debugged = subprocess.run(
        [sys.executable, *worker.split()[1:]],
        cwd=tmp_path, stdin=terminal, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    os.close(typed)
    os.close(terminal)
    assert debugged.returncode == 0, debugged.stderr
    assert "(Pdb) 42" in debugged.stdout
    assert "finished" in debugged.stdout + debugged.stderr
