"""Helpers of the tests that launch: real CLI processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from dtrain import trace
from dtrain.run.rundir import RunDir, list_runs
from support import EXAMPLES, JOBS, warm

TINY = JOBS / "tiny" / "job.yaml"
DIGITS = EXAMPLES / "digits" / "job.yaml"
DTRAIN = [sys.executable, "-m", "dtrain"]
SLOW = ("--set", "args.pause=0.05", "--set", "train.steps=60")
OFTEN = ("--set", "checkpoint.every_steps=2")


def dtrain(
    *arguments: str | Path, cwd: Path, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [*DTRAIN, *map(str, arguments)]
    with warm.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextlib.contextmanager
def started(
    *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command while it runs; at the end it and all below it are gone, or the test fails."""
    process = warm.Popen(
        [*DTRAIN, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    try:
        yield process
    finally:
        below = descendants(process.pid)
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)
        left = [p for p in below if alive(p)]
        if left and not wait_for(lambda: not any(map(alive, left)), 10):
            for survivor in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
            raise AssertionError(f"left behind: {left}")


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def listeners(processes: Iterable[psutil.Process]) -> set[str]:
    """The addresses on which these listen; those of a cluster have networks of their own."""
    found = set()
    for process in processes:
        proc = Path("/proc", str(process.pid))
        with contextlib.suppress(OSError):
            sockets = _opened(process.pid)
            for kind in ("tcp", "tcp6"):
                for line in (proc / "net" / kind).read_text().splitlines()[1:]:
                    _, local, _, state, *rest = line.split()
                    if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                        found.add(_address(local.partition(":")[0]))
    return found


def _address(text: str) -> str:
    """An address as the kernel shows it: words of which the last byte comes first."""
    words = bytes.fromhex(text)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return str(ipaddress.ip_address(packed))


def of_nodes(run: RunDir) -> list[psutil.Process]:
    """The nodes of a run with their agents and workers, on whatever host: they write its logs."""
    logs = f"{run.path}/attempts/"
    return [p for p in psutil.process_iter() if any(o.startswith(logs) for o in _opened(p.pid))]


def _opened(pid: int) -> set[str]:
    """What a process has open."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry))
    return found


def network_address() -> str:
    """An address of this machine on which others reach it; a loopback one where it has none."""
    addresses = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return min(addresses, key=lambda address: address.startswith("127."), default="127.0.0.1")


def command_of(process: psutil.Process) -> str:
    """Its command line; empty when it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that is only waiting to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


_PATIENCE = 3
"""How much slower a machine may be for a while, when others use it too."""


def wait_for(condition: Callable[[], Any], timeout: float) -> Any:
    """Poll until the condition is true; its value, or the last false one when time is up.

    Looking takes at most a fifth of a core, since what is waited for needs the cores too. Time is
    up only after `_PATIENCE` times `timeout`, in seconds.
    """
    deadline = time.monotonic() + _PATIENCE * timeout
    while True:
        began = time.monotonic()
        value = condition()
        ended = time.monotonic()
        if value or ended > deadline:
            return value
        time.sleep(min(max(0.02, 4 * (ended - began)), deadline - ended))


def until(what: str, look: Callable[[], object], timeout_s: float = 30.0) -> None:
    assert wait_for(look, timeout_s), f"waited {timeout_s} s in vain for {what}"


def status(run: RunDir) -> dict[str, Any]:
    done = dtrain("status", run.id, "--json", cwd=run.path.parents[1])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def recorded(cwd: Path, *arguments: str | Path) -> tuple[RunDir, trace.Recording]:
    """A launch to its end in a directory of its own, and what each of its steps did."""
    cwd.mkdir()
    wish = ("--env", f"{trace.VARIABLE}={{}}")
    done = dtrain("launch", *wish, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(cwd)
    return run, trace.read(run)


def the_run(folder: Path) -> RunDir:
    """The one run below `folder/runs`."""
    (run,) = list_runs(folder / "runs")
    return run


def events(run: RunDir, kind: str | None = None) -> list[dict[str, Any]]:
    """The run's events, of one kind or all."""
    if not run.events.exists():
        return []
    lines = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [line for line in lines if kind is None or line["event"] == kind]


def metrics(run: RunDir, split: str = "train") -> list[dict[str, Any]]:
    """The run's metrics of one split."""
    if not run.metrics.exists():
        return []
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def wait_for_step(folder: Path, step: int, timeout: float = 60) -> RunDir:
    """Wait until the run in a directory has done a step."""

    def reached() -> bool:
        runs = list_runs(folder / "runs")
        return bool(runs) and any(line["step"] >= step for line in metrics(runs[0]))

    assert wait_for(reached, timeout), f"no step {step} after {timeout} s"
    return the_run(folder)


def worker_pids(run: RunDir) -> dict[int, int]:
    """rank → pid of the workers started last."""
    pids: dict[int, int] = {}
    per_node: dict[int, list[int]] = {}
    for event in events(run, "workers_started"):
        per_node[event["node_rank"]] = event["pids"]
    for node_rank in sorted(per_node):
        for pid in per_node[node_rank]:
            pids[len(pids)] = pid
    return pids


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal one process that a test started."""
    os.kill(pid, number)
