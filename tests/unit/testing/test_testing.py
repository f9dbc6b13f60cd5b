"""The pytest plugin, as far as no rank is needed."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.forking import Channel
from dtrain.testing import body, leaks, report, wire
from dtrain.testing.watch import reserve_port
from dtrain.testing.wire import Answer, Kind, Layout, Outcome, RankResult

MISUSES = """
import threading, unittest
import pytest

pytestmark = pytest.mark.ranks(2)

@pytest.fixture
def lock():
    return threading.Lock()

def test_lock(lock): pass
def test_monkeypatch(monkeypatch): pass
def test_request(request): pass
async def test_async(): pass

@pytest.mark.ranks
def test_no_number(): pass

@pytest.mark.ranks(3, nodes=2)
def test_uneven(): pass

@pytest.mark.ranks(4, nodes=2, ranks=2)
def test_twice(): pass

@pytest.mark.ranks(2, tiemout=3)
def test_typo(): pass

@pytest.mark.ranks("2")
def test_text(): pass

class TestCase(unittest.TestCase):
    def test_unittest(self): pass
"""

LEAKS = """
import os, socket, subprocess, sys, threading
import pytest

@pytest.fixture(autouse=True)
def guarded(leak_guard): yield

kept = []
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]

def test_clean():
    subprocess.run([sys.executable, "-c", ""], check=True)
    socket.create_server(("127.0.0.1", 0)).close()

def test_child():
    kept.append(subprocess.Popen(SLEEP))

def test_zombie():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def test_orphan(tmp_path):
    code = f"import subprocess; p = subprocess.Popen({SLEEP!r}); print(p.pid)"
    out = subprocess.run([sys.executable, "-c", code], stdout=open(tmp_path / "pid", "w"))
    kept.append(int((tmp_path / "pid").read_text()))

def test_port():
    kept.append(socket.create_server(("127.0.0.1", 0)))

def test_shm():
    with open(f"/dev/shm/dtrain-test-{os.getpid()}", "w") as file:
        file.write("x")

def test_env(monkeypatch):
    os.environ["DTRAIN_LEAKED"] = "secret"
    monkeypatch.setenv("UNDONE", "1")

def test_all_was_ended():
    assert not os.path.exists(f"/proc/{kept[0].pid}")
    with pytest.raises(OSError):
        socket.create_connection(kept[2].getsockname())
    assert not os.path.exists(f"/dev/shm/dtrain-test-{os.getpid()}")
    assert "DTRAIN_LEAKED" not in os.environ
    path = f"/proc/{kept[1]}/stat"
    assert not os.path.exists(path) or open(path).read().split(")")[1].split()[0] == "Z"
"""


def answer(*outcomes: Outcome, timed_out_s: float | None = None) -> Answer:
    results = [RankResult(rank, outcome) for rank, outcome in enumerate(outcomes)]
    return Answer(Layout(len(outcomes)), results, timed_out_s)


def ended(kind: Kind, time: float = 0.0, headline: str = "", text: str = "") -> Outcome:
    return Outcome(kind, time, headline, text)


LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer"


def test_the_plugin_imports_no_torch() -> None:
    code = (
        "import sys, dtrain.testing.plugin, dtrain.testing.leaks; "
        "sys.exit(bool({'torch', 'numpy', 'psutil'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_held_port_is_rank_0s_on_every_address() -> None:
    with reserve_port() as holder, socket.socket() as other, socket.socket() as rank_0:
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.2", port))
        rank_0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank_0.bind(("", port))
        rank_0.listen()


def test_layout_gives_torchruns_variables() -> None:
    env = Layout(6, nodes=2).env(4, 1234)
    expected = {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "1",
        "NODE_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert expected.items() <= env.items()


@pytest.mark.parametrize(
    ("size", "nodes", "message"),
    [
        (0, 1, "world_size is 0"),
        (3, 2, "3 ranks cannot be spread evenly over 2 nodes"),
        (True, 1, "world_size is True"),
        (2, -1, "nodes is -1"),
    ],
)
def test_layout_refuses_what_cannot_be(size: int, nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(size, nodes)


def test_all_passed_is_no_verdict() -> None:
    assert report.judge(answer(ended("passed"), ended("passed"))) is None


def test_the_first_failure_in_time_is_the_culprit() -> None:
    verdict = report.judge(
        answer(
            ended("failed", 2.0, LOST),
            ended("passed"),
            ended("failed", 1.0, "KeyError: 'boom'", "traceback of rank 2"),
            ended("failed", 3.0, LOST.replace("553", "537")),
            ended("killed"),
        )
    )
    assert verdict is not None
    assert (verdict.kind, verdict.rank) == ("failed", 2)
    assert verdict.headline == "rank 2: KeyError: 'boom'"
    assert verdict.text == (
        "rank 2 of 5 failed first:\n\ntraceback of rank 2\n\n"
        "ranks 0, 3: lost the connection to a rank that had ended\n"
        "rank 4: still running, killed\n"
    )


@pytest.mark.parametrize("seen_at", [0.0, 5.0])
def test_a_death_comes_before_what_it_caused(seen_at: float) -> None:
    lost = ended("failed", 1.0, "MyError: no luck", f"{LOST}\nDuring handling of ...: MyError")
    verdict = report.judge(
        answer(ended("failed", 1.0, LOST), ended("died", seen_at, "killed by X"), lost)
    )
    assert verdict is not None
    assert verdict.text.splitlines()[0] == "rank 1 of 3: killed by X"
    assert "ranks 0, 2: lost the connection" in verdict.text


def test_a_skip_in_one_rank_does_not_hide_a_failure_in_another() -> None:
    verdict = report.judge(answer(ended("skipped", 1.0, "no"), ended("failed", 2.0, "ValueError")))
    assert verdict is not None
    assert (verdict.kind, verdict.rank) == ("failed", 1)
    assert "rank 0: skipped: no" in verdict.text


def test_a_skip_in_all_ranks_is_a_skip() -> None:
    verdict = report.judge(answer(ended("skipped", 1.0, "no"), ended("skipped", 2.0, "no")))
    assert verdict is not None
    assert verdict.kind == "skipped"
    assert isinstance(verdict.error, pytest.skip.Exception)


def test_a_timeout_shows_the_stacks_of_those_still_running() -> None:
    given = answer(ended("killed"), ended("passed"), ended("killed"), timed_out_s=2.5)
    given.results[0].stack = (
        "Current thread 0x01 (most recent call first):\n"
        '  File "t.py", line 3 in test_x\n'
        f'  File "{body.__file__}", line 9 in run\n'
        '  File "pytest.py", line 1 in main\n'
    )
    verdict = report.judge(given)
    assert verdict is not None
    assert verdict.text == (
        "timed out after 2.5 s: ranks 0, 2 of 3 still running\n\n"
        "---- rank 0 ----\n"
        "Current thread 0x01 (most recent call first):\n"
        '  File "t.py", line 3 in test_x\n\n'
        "---- rank 2 ----\n"
        "no stack: the process did not react\n\n"
        "rank 1 passed\n"
    )


def test_a_ranks_system_exit_does_not_end_the_caller() -> None:
    outcome = ended("failed", 1.0, "SystemExit: 3")
    outcome.value = pickle.dumps(SystemExit(3))
    verdict = report.judge(answer(outcome))
    assert verdict is not None
    assert verdict.error is None


def test_a_value_of_any_size_comes_with_a_message() -> None:
    ours, theirs = Channel.pair()
    wire.send(theirs, {"n": 1}, ["x" * 10_000_000])
    theirs.close()
    message, files = ours.receive_with_files(5)
    assert message == {"n": 1}
    assert wire.load(*files) == ["x" * 10_000_000]
    ours.close()


def test_misuse_is_explained(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(MISUSES)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers")
    result.assert_outcomes(failed=8, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "the value of `lock`, a lock, cannot be sent to the ranks: cannot pickle*",
            "the fixture `monkeypatch` works in pytest's own process only*in the body",
            "the fixture `request` works in pytest's own process only*",
            "an async test cannot have ranks",
            "*the number of ranks is missing: write ranks(4) or ranks(nodes=2, ranks=2)*",
            "*3 ranks cannot be spread evenly over 2 nodes",
            "*give the world size or `ranks` per node, not both",
            "*unexpected keyword argument 'tiemout'",
            "*world_size is '2'; give a whole number of at least 1",
            "only plain test functions and methods can have ranks",
        ]
    )


def test_rank_needs_the_marker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(rank): pass\ndef test_y(world_size): pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines_random(["*`rank` needs @pytest.mark.ranks", "*`world_size` needs*"])


def test_the_marker_is_registered(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.ranks(world_size=None, *"])


def test_a_leak_fails_the_test_and_is_ended(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LEAKS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=8, errors=6)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_child*",
            "the test left behind:",
            "  process *: *import time; time.sleep(60)",
            "*ERROR at teardown of test_zombie*",
            "  process * (dead, never waited for): *",
            "*ERROR at teardown of test_orphan*",
            "  process *: *import time; time.sleep(60)",
            "*ERROR at teardown of test_port*",
            "  listening port *",
            "*ERROR at teardown of test_shm*",
            "  file /dev/shm/dtrain-test-*",
            "*ERROR at teardown of test_env*",
            "  environment variable DTRAIN_LEAKED, set",
        ]
    )
    assert "secret" not in result.stdout.str()
    assert not list(Path("/dev/shm").glob("dtrain-test-*"))


def test_a_file_of_a_living_process_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's test may leave one for a moment, which its own guard takes away.

    In a directory of its own: what an ended process has left in /dev/shm, any worker's guard takes.
    """
    monkeypatch.setattr(leaks, "_SHM", tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        path = tmp_path / f"dtrain-of-{other.pid}"
        try:
            with leaks.watching(processes=False) as found:
                path.touch()
            assert found == []
            other.communicate(b"\n")
            path.unlink()
            with leaks.watching(processes=False) as found:
                path.touch()
            assert found == [f"file {path}"]
        finally:
            path.unlink(missing_ok=True)
