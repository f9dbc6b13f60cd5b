"""Asking a process where it is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dtrain.node import stack_dump
from dtrain.procs import fork_child
from dtrain.run.failures import Frame


def busy(ready: int) -> int:
    os.write(ready, b"x")
    while True:
        time.sleep(60)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_tells_where_it_is_unless_it_is_stopped(tmp_path: Path, stopped: bool) -> None:
    log = tmp_path / "log"
    log.write_text('what it said before\n  File "x.py", line 1 in f\n')
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    heard, ready = os.pipe()

    def run() -> int:
        stack_dump.enable()
        return busy(ready)

    pid = fork_child(run, stdout=file, stderr=file, keep_fds=[ready])
    try:
        assert os.read(heard, 1) == b"x"
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        (found,) = stack_dump.request([log], lambda: os.kill(pid, stack_dump.SIGNAL)).values()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (file, heard, ready):
            os.close(fd)
    if stopped:
        assert found == []
    else:
        assert (found[0].function, found[0].file) == ("busy", __file__)
        assert found[0].code in ('os.write(ready, b"x")', "time.sleep(60)")


def test_who_waits_for_others_is_told_from_who_hangs() -> None:
    torch = "/lib/python3/site-packages/torch"
    waiting = Frame(f"{torch}/distributed/distributed_c10d.py", 3123, "all_reduce", "")
    reducing = Frame(f"{torch}/autograd/graph.py", 979, "_engine_run_backward", "")
    own = Frame("/home/me/task.py", 3, "loss", "")
    leaving = Frame("/src/dtrain/node/worker.py", 3, "record_failure", "")
    assert stack_dump.is_waiting_or_failing([waiting, own])
    assert stack_dump.is_waiting_or_failing([reducing, own])
    assert stack_dump.is_waiting_or_failing([own, leaving])
    assert not stack_dump.is_waiting_or_failing([own, reducing])
    assert not stack_dump.is_waiting_or_failing([])
