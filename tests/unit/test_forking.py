"""What fork servers are made of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.forking import Channel


def test_a_channel_keeps_messages_whole_and_hands_files_over() -> None:
    ours, theirs = Channel.pair()
    assert ours.receive() is None
    began = time.monotonic()
    assert ours.receive(0.05) is None
    assert time.monotonic() - began >= 0.05
    theirs.send({"large": "x" * 10_000})
    with open(os.memfd_create("file"), "w+") as file:
        file.write("read me")
        file.flush()
        theirs.send({"n": 2}, [file.fileno()])
    theirs.send_if_room({"n": 3})
    theirs.close()
    assert ours.receive(5) == {"large": "x" * 10_000}
    message, (fd,) = ours.receive_with_files(5)
    assert (message, os.pread(fd, 100, 0)) == ({"n": 2}, b"read me")
    os.close(fd)
    assert ours.receive(None) == {"n": 3}
    with pytest.raises(EOFError):
        ours.receive()
    with pytest.raises(OSError):
        ours.send({})
    ours.close()


CHILDREN = """
import os, signal, time
from dtrain.forking import Channel, Children
from dtrain.procs import become_subreaper, fork_child

become_subreaper()
children = Children()
ours, theirs = Channel.pair()
assert children.wait([ours], 0.01) == set()

def leaves_an_orphan():
    pid = os.fork()
    if not pid:
        time.sleep(0.2)
        os._exit(5)
    theirs.send({"orphan": pid})
    return 3

first = fork_child(leaves_an_orphan, keep_fds=[theirs.fileno()])
second = fork_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
codes, large = {}, 0
orphan = ours.receive(20)["orphan"]
while len(codes) < 3:
    children.wait([ours])
    for ended in children.reap():
        codes[ended.pid] = ended.code
        large += ended.peak > 1_000_000
assert codes == {first: 3, second: -signal.SIGKILL, orphan: 5}, codes
assert large == 3
signal.signal(signal.SIGUSR1, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR1)
assert children.wait([ours]) == set(), "a signal ends it"
theirs.send({})
assert children.wait([ours, theirs]) == {ours.fileno()}
"""


def test_children_and_orphans_are_waited_for_and_reaped() -> None:
    subprocess.run([sys.executable, "-c", CHILDREN], check=True, timeout=60)


IMPORTS = """
import gc, sys
from dtrain.forking import import_once

told = []
started = import_once(["colorsys", "threads"], ["threads"], between=lambda: told.append(1))
print(started, len(told), "colorsys" in sys.modules, gc.get_freeze_count() > 0)
"""


def test_imports_of_the_current_folder_and_the_threads_they_start(tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    (tmp_path / "colorsys.py").write_text("raise ImportError('not for the standard library')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTS],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["1", "2", "True", "True"]
