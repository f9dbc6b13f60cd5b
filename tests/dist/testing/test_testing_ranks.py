"""The pytest plugin and `run_ranks`, with real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from dtrain.testing import RankError, client, run_ranks
from support.launch import wait_for

SCENARIOS = """
import os, signal, sys, time
import pytest
import torch
import torch.distributed as dist

def wait():
    dist.all_reduce(torch.ones(1))

@pytest.mark.ranks(4)
def test_assert(rank):
    print("out of", rank)
    print("err of", rank, file=sys.stderr)
    assert [1, rank] == [1, rank if rank != 2 else 7]

@pytest.mark.ranks(3)
def test_raise(rank):
    if rank == 1:
        raise KeyError("boom")
    wait()

@pytest.mark.ranks(2)
def test_collateral_is_killed(rank):
    if rank == 1:
        raise KeyError("boom")
    time.sleep(60)

@pytest.mark.ranks(3, timeout=1.5)
def test_timeout(rank):
    if rank == 2:
        while True:
            time.sleep(0.1)
    wait()

@pytest.mark.ranks(3)
def test_sigkill(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait()

@pytest.mark.ranks(2)
def test_os_exit(rank):
    if rank == 1:
        os._exit(3)
    wait()

@pytest.mark.ranks(2)
def test_sys_exit(rank):
    sys.exit(4)

@pytest.mark.ranks(2)
def test_skip(rank):
    pytest.skip("not here")

@pytest.mark.ranks(2)
def test_xfail(rank):
    pytest.xfail("not yet")

@pytest.mark.xfail(raises=KeyError, strict=True)
@pytest.mark.ranks(2)
def test_xfail_raises(rank):
    raise KeyError

@pytest.mark.xfail(raises=KeyError)
@pytest.mark.ranks(2)
def test_xfail_raises_other(rank):
    raise ValueError("other")

@pytest.mark.filterwarnings("error:beware")
@pytest.mark.ranks(1)
def test_warning(rank):
    import warnings
    warnings.warn("beware")
"""

FOREVER = """
import os, time
import pytest

@pytest.mark.ranks(3)
def test_forever(rank):
    with open(f"pid-{rank}.tmp", "w") as file:
        file.write(f"{os.getpid()} {os.getppid()}")
    os.rename(f"pid-{rank}.tmp", f"pid-{rank}")
    while True:
        time.sleep(60)
"""

SCRIPT = """
import os, sys
from dtrain.testing import RankError, run_ranks

def own_rank(offset, *, factor=1):
    import torch.distributed as dist
    return (dist.get_rank() + offset) * factor

def fail():
    if os.environ["RANK"] == "1":
        raise ValueError("bad")

if __name__ == "__main__":
    assert "torch" not in sys.modules
    assert run_ranks(own_rank, 3, 10, factor=2) == [20, 22, 24]
    try:
        run_ranks(fail, 2)
    except RankError as error:
        assert error.rank == 1 and repr(error.__cause__) == "ValueError('bad')"
        print(error)
"""


class Gate:
    """Something of a test module's own that is picklable."""

    def __init__(self, limit: int) -> None:
        self.limit = limit


@pytest.fixture
def gate() -> Gate:
    return Gate(7)


@pytest.mark.ranks(4)
def test_ranks_share_a_process_group(rank: int, world_size: int, gate: Gate) -> None:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    assert total == sum(range(world_size))
    assert (dist.get_rank(), dist.get_world_size(), gate.limit) == (rank, 4, 7)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_world_size_can_be_parametrized(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size
    assert 0 <= rank < world_size


@pytest.mark.ranks(nodes=2, ranks=2)
def test_nodes(rank: int) -> None:
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")
    node, local = divmod(rank, 2)
    assert [int(os.environ[name]) for name in names] == [local, 2, node, node, 4, rank]


# The second group has a store of its own: on one port, a rank that is quick joins the store that
# rank 0 is just taking down, and is refused at an address of the group before.
@pytest.mark.ranks(2, init=False)
def test_a_body_can_make_its_own_process_groups(tmp_path: Path) -> None:
    for init_method in (None, f"file://{tmp_path / 'store'}"):
        assert not dist.is_initialized()
        dist.init_process_group(
            "gloo", init_method=init_method, rank=int(os.environ["RANK"]), world_size=2
        )
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones == 2
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DTRAIN_TEST_VALUE", "carried over")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.ranks(2)
def test_environment_and_folder_are_carried_over(prepared: Path) -> None:
    assert os.environ["DTRAIN_TEST_VALUE"] == "carried over"
    assert Path.cwd() == prepared


@pytest.mark.ranks(2)
def test_ranks_come_from_a_warm_single_threaded_server() -> None:
    assert "torch._dynamo" in sys.modules
    assert torch.get_num_threads() == 1
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1


@pytest.mark.ranks(2)
def test_standard_input_is_empty_and_output_works() -> None:
    assert sys.stdin.read() == ""
    print("shown only on failure")
    os.system("echo also of children")


class TestInAClass:
    def setup_method(self) -> None:
        self.limit = 5

    @pytest.mark.ranks(2)
    def test_attributes_are_carried_over(self, rank: int) -> None:
        assert self.limit == 5


def reduce(value: float, *, scale: float = 1.0) -> tuple[int, float]:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return dist.get_rank(), float(total) * scale


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        assert [rank] == [rank, rank]
    dist.barrier()


def leave_shared_memory() -> None:
    shared_memory.SharedMemory(create=True, size=64)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave_daemon() -> int:
    return subprocess.Popen(["sleep", "60"], start_new_session=True).pid


def test_run_ranks_returns_by_rank() -> None:
    assert run_ranks(reduce, 3, 2.0, scale=0.5) == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_run_ranks_names_the_rank() -> None:
    with pytest.raises(RankError, match="rank 1 of 2") as caught:
        run_ranks(fail_on, 2, 1)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, AssertionError)
    assert "Right contains one more item: 1" in str(caught.value)
    assert "rank 0: lost the connection" in str(caught.value)


def test_run_ranks_refuses_what_cannot_be_pickled() -> None:
    with pytest.raises(RankError, match=r"generator.* pickled"):
        run_ranks(returns_a_generator, 1)


def returns_a_generator() -> object:
    return (x for x in range(3))


def test_shared_memory_of_killed_ranks_is_released() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2: .*SIGKILL"):
        run_ranks(leave_shared_memory, 2)


def test_daemons_of_ranks_are_ended() -> None:
    assert not any(psutil.pid_exists(pid) for pid in run_ranks(leave_daemon, 2))


def test_nothing_is_left_after_20_runs() -> None:
    server = client.current_server()
    run_ranks(reduce, 2, 1.0)

    def opened() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), server.pid)]

    before = opened()
    for _ in range(20):
        run_ranks(reduce, 2, 1.0)
    # the server closes the file of an answer when we may have read it already
    assert wait_for(lambda: all(a <= b for a, b in zip(opened(), before, strict=True)), 10)
    assert psutil.Process(server.pid).children() == []
    assert psutil.Process(server.pid).num_threads() == 1


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scenarios")
    (folder / "test_scenarios.py").write_text(SCENARIOS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--junitxml=x.xml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert (folder / "x.xml").stat().st_size > 0
    return run.stdout + run.stderr


def section(text: str, test: str) -> str:
    """What pytest shows of one failed test."""
    _, found, rest = text.partition(f" {test} _")
    assert found, text
    return rest.partition("\n____")[0].partition("\n====")[0]


def test_a_failing_assert_is_explained_with_its_rank(scenarios: str) -> None:
    shown = section(scenarios, "test_assert")
    assert "rank 2 of 4 failed:" in shown
    assert "E       assert [1, 2] == [1, 7]" in shown
    assert "At index 1 diff: 2 != 7" in shown
    assert "test_scenarios.py:14: AssertionError" in shown
    assert "FAILED test_scenarios.py::test_assert - rank 2: AssertionError: assert" in scenarios


def test_output_is_shown_by_rank(scenarios: str) -> None:
    shown = section(scenarios, "test_assert")
    for rank in range(4):
        assert f"Captured stdout rank {rank} call" in shown
        assert f"out of {rank}\n" in shown
        assert f"err of {rank}" in shown


def test_one_failure_is_told_from_its_consequences(scenarios: str) -> None:
    shown = section(scenarios, "test_raise")
    assert "rank 1 of 3 failed first:" in shown
    assert "E           KeyError: 'boom'" in shown
    assert shown.rstrip().endswith("ranks 0, 2: lost the connection to a rank that had ended")
    shown = section(scenarios, "test_collateral_is_killed")
    assert 'rank 0: still running, killed at File "' in shown
    assert "line 26 in test_collateral_is_killed" in shown


def test_a_timeout_shows_every_stack(scenarios: str) -> None:
    shown = section(scenarios, "test_timeout")
    assert "timed out after 1.5 s: ranks 0, 1, 2 of 3 still running" in shown
    for rank in range(3):
        stack = shown.partition(f"---- rank {rank} ----")[2].partition("----")[0]
        assert "in test_timeout" in stack
        assert ("in all_reduce" in stack) == (rank != 2)
        assert "pluggy" not in stack


def test_deaths_are_told(scenarios: str) -> None:
    assert "rank 1 of 3: killed by SIGKILL" in section(scenarios, "test_sigkill")
    shown = section(scenarios, "test_os_exit")
    assert "rank 1 of 2: the process ended with exit status 3 in the middle of the body" in shown
    assert "SystemExit: 4" in section(scenarios, "test_sys_exit")


def test_skips_and_expected_failures(scenarios: str) -> None:
    assert "SKIPPED [1] test_scenarios.py:" in scenarios
    assert ": not here" in scenarios
    assert "XFAIL test_scenarios.py::test_xfail - not yet" in scenarios
    assert "XFAIL test_scenarios.py::test_xfail_raises" in scenarios
    assert "FAILED test_scenarios.py::test_xfail_raises_other" in scenarios
    assert "9 failed, 1 skipped, 2 xfailed" in scenarios


def test_warning_filters_are_carried_over(scenarios: str) -> None:
    assert "UserWarning: beware" in section(scenarios, "test_warning")


def run_forever(folder: Path) -> tuple[subprocess.Popen[str], set[int]]:
    """A pytest whose ranks do not end, and the pids of the ranks and of their server."""
    (folder / "test_forever.py").write_text(FOREVER)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    files = [folder / f"pid-{rank}" for rank in range(3)]
    until(lambda: all(file.exists() for file in files) or process.poll() is not None, 120)
    return process, {int(pid) for file in files for pid in file.read_text().split()}


def until(true: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_pytest(sig: signal.Signals, tmp_path: Path) -> None:
    process, pids = run_forever(tmp_path)
    assert len(pids) == 4
    process.send_signal(sig)
    output, _ = process.communicate(timeout=90)
    until(lambda: all(gone(pid) for pid in pids), 5)
    assert process.returncode == (2 if sig == signal.SIGINT else -sig), output


def test_run_ranks_in_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "rank 1 of 2 failed" in run.stdout
    assert "ValueError: bad" in run.stdout


def test_run_ranks_needs_a_guarded_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dtrain.testing import run_ranks\ndef f(): pass\nprint(run_ranks(f, 1))\n"
    )
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 1
    assert "put the call under `if __name__ == '__main__':`" in run.stderr
