"""Runs one request: forks its ranks, watches them, dumps their stacks and ends them."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from dtrain.forking import Channel, Children
from dtrain.procs import fork_child
from dtrain.testing import body
from dtrain.testing.wire import Answer, Outcome, RankResult, Request

if TYPE_CHECKING:
    import pytest

GRACE_S = 1.0
"""The time that the others may continue after the first rank that did not pass."""
_TICK_S = 1.0
_STACKS_S = 1.0
_HELPERS_S = 0.5
_OUTPUT_LIMIT = 256 * 1024
_STACK_SIGNAL = signal.SIGRTMAX - 3


class _Rank:
    """A forked rank: its process, and memory files for its output."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.result, self.stdout, self.stderr, self.stack = (
            os.memfd_create(f"dtrain-{name}") for name in ("result", "stdout", "stderr", "stack")
        )
        self.pid = 0
        self.code: int | None = None
        """The exit status of the process, or the number of the signal that killed it, negative."""
        self.outcome: Outcome | None = None

    def report(self, outcome: Outcome) -> None:
        """Record how the body ended. It is called in the rank, and the last call counts."""
        with open(self.result, "wb", closefd=False) as file:
            file.write(pickle.dumps(outcome))

    def reported(self) -> Outcome | None:
        """Return the last complete outcome that the rank has reported; None if there is none."""
        data = io.BytesIO(_read(self.result))
        last: Outcome | None = None
        with contextlib.suppress(Exception):
            while True:
                last = pickle.load(data)
        return last

    def kill(self, sig: int) -> None:
        if self.code is None:
            os.kill(self.pid, sig)

    def close(self) -> None:
        for fd in (self.result, self.stdout, self.stderr, self.stack):
            os.close(fd)


def reserve_port() -> socket.socket:
    """Bind a port that no other process is given, and that rank 0 may bind too. It never listens.

    It is bound on all addresses, because torch's store listens on all. A port held on one address
    could be given to a listener or a connection on another. Then rank 0 could not bind it.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    holder = socket.socket(family)
    if family == socket.AF_INET6:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


class Run:
    """One request: a context within which its ranks exist."""

    def __init__(
        self,
        request: Request,
        items: Mapping[str, pytest.Function],
        inherited: set[int],
        children: Children,
    ) -> None:
        self._request = request
        self._children = children
        self._item = items.get(request.nodeid or "")
        self._inherited = inherited
        self._first_failure: float | None = None

    def __enter__(self) -> Run:
        self._port_holder = reserve_port()
        self._port: int = self._port_holder.getsockname()[1]
        # the server holds it too, so that the pipe stays open when all ranks have ended
        self._done, self._done_write = os.pipe()
        self._ranks = [_Rank(number) for number in range(self._request.layout.world_size)]
        self._started = time.monotonic()
        for rank in self._ranks:
            rank.pid = fork_child(
                partial(self._in_rank, rank),
                stdout=rank.stdout,
                stderr=rank.stderr,
                keep_fds=[*self._inherited, rank.result, rank.stack, self._done_write],
            )
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.close()
        os.close(self._done)
        os.close(self._done_write)
        self._port_holder.close()

    def _in_rank(self, rank: _Rank) -> int:
        faulthandler.enable(2)
        faulthandler.register(_STACK_SIGNAL, file=rank.stack, all_threads=True)
        body.run(rank.number, self._request, self._port, self._item, rank.report)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(self._done_write, struct.pack("<I", rank.number))
        outcome = rank.reported()
        while outcome and outcome.kind == "passed":
            signal.pause()  # other ranks may need this one's sockets; all are killed at the end
        return 1

    def until_done(self, channel: Channel, parent: int) -> Answer:
        """Watch the ranks until all have reported or must be killed. No process is left."""
        answer = Answer(self._request.layout)
        while pending := [rank for rank in self._ranks if rank.outcome is None]:
            left = self._limit() - time.monotonic()
            if left <= 0:
                if self._first_failure is None:
                    answer.timed_out_s = self._request.timeout_s
                _dump_stacks(pending)
                break
            ready = self._children.wait([channel, self._done], min(left, _TICK_S))
            if channel.fileno() in ready or os.getppid() != parent:
                break  # the caller no longer waits for the answer
            self._collect(pending, is_one_done=self._done in ready)
        self._end()
        answer.results = [_result(rank) for rank in self._ranks]
        return answer

    def _limit(self) -> float:
        limit = self._started + self._request.timeout_s
        if self._first_failure is None:
            return limit
        return min(limit, self._first_failure + GRACE_S)

    def _collect(self, pending: list[_Rank], *, is_one_done: bool) -> None:
        """Collect the reports of ranks, and the ends of those that never will report."""
        codes = {ended.pid: ended.code for ended in self._children.reap()}
        for rank in self._ranks:
            rank.code = codes.get(rank.pid, rank.code)
        reported: set[int] = set()
        if is_one_done:
            reported = {rank for (rank,) in struct.iter_unpack("<I", os.read(self._done, 4096))}
        new = []
        for rank in pending:
            if rank.code is not None:
                rank.outcome = rank.reported() or self._died(rank.code)
            elif rank.number in reported:
                rank.outcome = rank.reported()
            new.append(rank.outcome)
        if self._first_failure is None and any(each and each.kind != "passed" for each in new):
            self._first_failure = time.monotonic()

    def _died(self, code: int) -> Outcome:
        """Return the outcome of a rank that ended without a report.

        It could not record the time. A death that is seen before any failure happened before it.
        One seen later may still be the cause of broken connections: `report.judge` allows for it.
        """
        if code < 0:
            from dtrain.run.failures import signal_name

            headline = f"killed by {signal_name(-code)}"
        else:
            headline = f"the process ended with exit status {code} in the middle of the body"
        died_at = 0.0 if self._first_failure is None else time.monotonic()
        return Outcome("died", died_at, headline)

    def _end(self) -> None:
        for rank in self._ranks:
            rank.kill(signal.SIGKILL)
        for rank in self._ranks:
            if rank.code is None:
                os.waitpid(rank.pid, 0)
        _end_orphans()


def _result(rank: _Rank) -> RankResult:
    outcome = rank.outcome or rank.reported() or Outcome("killed", time.monotonic())
    texts = [_tail(fd) for fd in (rank.stdout, rank.stderr, rank.stack)]
    return RankResult(rank.number, outcome, *texts)


def _dump_stacks(ranks: list[_Rank]) -> None:
    """Have the ranks write their stacks, even if they are blocked in C."""
    for rank in ranks:
        rank.kill(_STACK_SIGNAL)
    deadline = time.monotonic() + _STACKS_S
    sizes: list[int] = []
    while time.monotonic() < deadline:
        time.sleep(0.02)
        before, sizes = sizes, [os.fstat(rank.stack).st_size for rank in ranks]
        if all(sizes) and sizes == before:
            return


def _end_orphans() -> None:
    """End the processes that the ranks left behind, which this process has adopted.

    Helpers such as multiprocessing's resource tracker clean up /dev/shm once their rank is gone, so
    they get a moment.
    """
    started = time.monotonic()
    while time.monotonic() < started + 10 * _HELPERS_S:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        if time.monotonic() > started + _HELPERS_S:
            import psutil

            for process in psutil.Process().children(recursive=True):
                process.kill()
        time.sleep(0.005)


def _read(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0)


def _tail(fd: int) -> str:
    size = os.fstat(fd).st_size
    start = max(0, size - _OUTPUT_LIMIT)
    text = os.pread(fd, size - start, start).decode(errors="replace")
    return f"[{start} bytes left out]\n{text}" if start else text
