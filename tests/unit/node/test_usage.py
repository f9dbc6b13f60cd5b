"""What an agent records of its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from dtrain import memory
from dtrain.node import usage
from dtrain.run.phases import read_usage
from dtrain.run.rundir import RunDir
from support.launch import until

BUSY = "import sys; held = bytearray(50_000_000); print(flush=True)\nwhile True: pass"
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])"


def test_the_children_of_a_rank_count_as_well(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.node(0, 3).mkdir(parents=True)
    log = usage.UsageLog(run, 0, 3)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, process_group=0
    ) as parent:
        try:
            assert parent.stdout is not None
            parent.stdout.readline()  # the child has its memory

            def two_records() -> bool:
                log.record({parent.pid: 12, 1 << 22: 13})  # the second has ended
                return len([*read_usage(run, 0)]) == 2

            until("two records", two_records)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
    (node_rank, _), (_, line) = read_usage(run, 0)
    assert node_rank == 3
    cores, resident = line["ranks"]["12"]
    assert 0.2 < cores < 1.5
    assert resident > 50_000_000
    assert line["ranks"]["13"] == [0.0, 0]
    assert line["cpus"] >= 1
    assert 0 < line["memory_used"] < line["memory_total"] == memory.total()
