"""Processes that cannot outlive their parent, and names for them."""

from __future__ import annotations

import os
import subprocess
import sys

from dtrain import procs


def test_an_identity_lasts_as_long_as_the_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        first = procs.identity(child.pid)
        assert first is not None
        assert first == procs.identity(child.pid)
        assert first != procs.identity(os.getpid())
    finally:
        child.kill()
    # dead and not yet waited for: it counts as ended
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert procs.identity(child.pid) is None
    child.wait()
    assert procs.identity(child.pid) is None


def test_a_dying_process_is_told_from_one_that_runs() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not procs.is_ending(child.pid)
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert procs.is_ending(child.pid)
    child.wait()
    assert procs.is_ending(child.pid)


HELD = """
import os, signal, time
from dtrain.procs import STOP_SIGNALS, fork_child

def child():
    deadline, told = time.monotonic() + 20, []
    while not signal.sigpending() >= {*STOP_SIGNALS} and time.monotonic() < deadline:
        time.sleep(0.001)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: told.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return len(told)

for _ in range(20):
    pid = fork_child(child, block=STOP_SIGNALS)
    for number in STOP_SIGNALS:
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == len(STOP_SIGNALS), status
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


def test_a_child_hears_what_it_was_asked_before_it_could_listen() -> None:
    subprocess.run([sys.executable, "-c", HELD], check=True, timeout=30)


SCRIPT = """
import os, sys
from dtrain.procs import fork_child
read, write = os.pipe()
kept, other = os.pipe()

def child():
    opened = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
    os.write(write, repr((os.getpgrp() == os.getpid(), kept in opened, write in opened)).encode())
    return 7

pid = fork_child(child, keep_fds=[write])
_, status = os.waitpid(pid, 0)
print(os.read(read, 100).decode(), os.waitstatus_to_exitcode(status))
pid = fork_child(lambda: 1 // 0)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_leads_its_group_and_keeps_only_what_it_is_given() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.split("\n")[:2] == ["(True, False, True) 7", "1"]
    assert "ZeroDivisionError" in done.stderr


def test_an_orphan_ends_at_once() -> None:
    code = "from dtrain.procs import die_with_parent; die_with_parent(1 << 22); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) == (137, "")


def test_kill_group_of_nobody() -> None:
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    assert not procs.kill_group(child.pid)
