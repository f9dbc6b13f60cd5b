"""A plain script, launched as it is: three shapes that people write, and a crash."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dtrain.run.rundir import RunDir
from support import ROOT
from support.errors import assert_named
from support.launch import dtrain, events, started, status, the_run

EXAMPLE = ROOT / "examples" / "script" / "job.yaml"
SCRIPTS = ROOT / "tests" / "jobs" / "scripts"
TWO_BY_TWO = ("--nodes", "2", "--procs", "2")


def log_of(folder: Path, rank: int) -> str:
    _, path = the_run(folder).rank_logs(0)[rank]
    return path.read_text()


def test_a_hand_written_loop_goes_on_after_a_crash_in_the_middle_of_an_epoch(
    tmp_path: Path,
) -> None:
    crash = ("--", "--epochs", "3", "--crash-at", "15")
    done = dtrain("launch", *TWO_BY_TWO, EXAMPLE, *crash, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "rank 1 on node-0 failed: RuntimeError: a crash on purpose at step 15" in done.stdout
    assert "epoch 3: 9" in done.stdout  # in per cent
    run = the_run(tmp_path)
    assert [event["step"] for event in events(run, "resumed")] == [10]
    # 23 steps an epoch, each sample once: 10 came before the crash, 13 after
    assert [event["step"] for event in events(run, "checkpoint_saved")][-1] == 3 * 23
    again = dtrain("resume", cwd=tmp_path)
    assert again.returncode == 2
    assert "[run.finished]" in again.stderr


def test_a_script_that_fails_has_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise KeyError(sys.argv[1])\n"
        "dist.barrier()\n"
    )
    done = dtrain("launch", "--procs", "2", "train.py", "--", "of my own", cwd=tmp_path)
    assert done.returncode == 1
    assert f"FAILED: rank 1 on node 0 ({os.uname().nodename}) raised KeyError" in done.stdout
    assert "train.py:4 in <module>" in done.stdout
    assert "of my own" in done.stdout


def test_the_rank_that_left_is_named_and_not_who_lost_its_connection(tmp_path: Path) -> None:
    """On another node, which hears only that the first has failed."""
    (tmp_path / "leaves.py").write_text(
        "import sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1:\n"
        "    sys.exit()\n"
        "dist.barrier()\n"
    )
    done = dtrain("launch", "--nodes", "2", "leaves.py", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "FAILED: rank 1 on node 1 (node-1) exited early, by sys.exit(0): " in done.stdout
    assert "leaves.py:4 in <module>" in done.stdout
    assert f"rank 0 waited at {tmp_path.name}/leaves.py:5 in <module>" in done.stdout


def test_a_script_that_hangs_ends_after_the_collective_timeout_with_a_verdict(
    tmp_path: Path,
) -> None:
    """Groups for which it names a timeout keep that."""
    (tmp_path / "hangs.py").write_text(
        "import os, time, torch, torch.distributed as dist\n"
        "from datetime import timedelta\n"
        "dist.init_process_group('gloo')\n"
        "own = dist.new_group(timeout=timedelta(hours=1))\n"
        "for each in (dist.group.WORLD, dist.new_group(), own):\n"
        "    print('waits', each._get_backend(torch.device('cpu')).options._timeout)\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.sleep(60)\n"
        "dist.barrier()\n"
    )
    limit = ("--set", "launch.collective_timeout=3s")
    done = dtrain("launch", "--procs", "2", *limit, "hangs.py", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "FAILED: rank 1 on node 0" in done.stdout
    assert_named(done.stdout, ["(3 s)", "[failure.rank-absent]"])
    assert "hangs.py:8 in <module>" in done.stdout
    assert f"rank 0 waited at {tmp_path.name}/hangs.py:9 in <module>" in done.stdout
    silent = events(the_run(tmp_path), "silent")[0]["what"]  # on a busy machine still at the start
    assert silent in done.stdout
    assert re.search(r"ranks? 0.* at \S+/hangs.py:\d+ in <module>", silent)
    waits = [line.split()[1] for line in log_of(tmp_path, 0).splitlines() if "waits" in line]
    assert waits == ["0:00:03", "0:00:03", "1:00:00"]


def test_processes_that_make_no_group_are_told_that_each_trains_alone(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text("print('trained')\n")
    for procs, times in (("2", 1), ("1", 0)):
        done = dtrain("launch", "--procs", procs, "--run-id", procs, "loop.py", cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("WARNING dtrain: no process group to the end") == times
        assert done.stdout.count("each process trained alone") == times
        warning = status(RunDir(tmp_path / "runs" / procs))["warning"]
        assert (warning is not None) == bool(times)


def test_a_lightning_script_that_steps_two_optimizers_by_itself(tmp_path: Path) -> None:
    sizes = ("--", "--devices", "2", "--nodes", "2")
    script = SCRIPTS / "with_lightning.py"
    done = dtrain("launch", *TWO_BY_TWO, script, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    sums = set()
    for rank in range(4):  # two batches for each rank, two steps each
        _, found, rest = log_of(tmp_path, rank).partition(f"lightning rank {rank} of 4, 4 steps, ")
        assert found
        sums.add(rest.split()[0])
    assert len(sums) == 1, "one model on all ranks"


def test_what_it_prints_is_shown_at_once(tmp_path: Path) -> None:
    """The script waits until we have seen its line."""
    (tmp_path / "waits.py").write_text(
        "import pathlib, sys, time\n"
        "print('here')\n"
        "for _ in range(600):\n"
        "    if pathlib.Path('seen').exists(): sys.exit()\n"
        "    time.sleep(0.05)\n"
        "sys.exit('not seen within 30 s')\n"
    )
    with started("launch", "--procs", "1", "waits.py", cwd=tmp_path) as process:
        assert any("here" in line for line in process.stdout or ())
        (tmp_path / "seen").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_thread_that_a_script_leaves_behind_is_told_and_waited_for(tmp_path: Path) -> None:
    """Also after sys.exit(0), as an interpreter does."""
    (tmp_path / "leaves.py").write_text(
        "import os, pathlib, sys, threading, time\n"
        "def poll():\n"
        "    for _ in range(600):\n"
        "        if pathlib.Path('seen').exists(): return pathlib.Path('done').touch()\n"
        "        time.sleep(0.05)\n"
        "if os.environ['RANK'] == '1': threading.Thread(target=poll, name='poller').start()\n"
        "sys.exit(0)\n"
    )
    with started("launch", "--procs", "2", "leaves.py", cwd=tmp_path) as process:
        told = next(line for line in process.stdout or () if "poller" in line)
        waits = status(the_run(tmp_path))["waits"]
        (tmp_path / "seen").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()
    assert "rank 1" in told
    place = re.compile(rf"thread 'poller' at {tmp_path}/leaves.py:[345] in poll: ")
    assert place.search(told)
    assert place.search(waits)
    assert status(the_run(tmp_path))["waits"] is None


def test_asked_to_stop_it_saves_and_goes_on_by_resume(tmp_path: Path) -> None:
    launch = ("launch", "--procs", "2", EXAMPLE, "--", "--epochs", "100000")
    with started(*launch, cwd=tmp_path) as process:
        for line in process.stdout or ():
            if "epoch 2:" in line:
                break
        assert dtrain("cancel", "last", cwd=tmp_path).returncode == 0
        process.communicate(timeout=60)
    run = the_run(tmp_path)
    saved = events(run, "checkpoint_saved")[-1]["step"]
    done = dtrain("resume", "--set", "script_args=[--epochs, '2']", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [event["step"] for event in events(run, "resumed")] == [saved]
