"""`python -m dtrain.node.warm`: forks the node processes of many short launches of one job.

A node process spends 3.5 CPU seconds on `import torch` and what workers need (2 cores, 2026-11),
more than a training of five steps. This process does it once, and forks `python -m dtrain.node`
where torch is imported already; all else of such a launch is as in any other: its arguments,
environment, log and descriptors, its agents and workers, and how it ends. It has one thread for
ever, so that it may fork, and trains nothing, so that nothing of one launch comes into the next.

It ends with whoever started it, and all that it forked ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
from typing import Any

from dtrain.node import __main__ as node
from dtrain.node.channel import Channel
from dtrain.procs import (
    die_with_parent,
    fork_child,
    kill_group,
    offer_current_folder,
    threads_lost_by_fork,
)


def main() -> None:
    """Serve whoever is at the other end of the socket until it is closed; never returns."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.node.warm", description=main.__doc__)
    parser.add_argument("--parent", type=int, required=True, help="pid of the parent to die with")
    parser.add_argument("--socket", type=int, required=True, help="where requests come from")
    parser.add_argument("modules", nargs="*", help="imported besides torch")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    channel = Channel(socket.socket(fileno=arguments.socket))
    os.environ.update(node.ONE_THREAD)
    from dtrain.node import agent_process  # noqa: F401  as every node process does
    from dtrain.node.fork_server import WORKER_MODULES

    for module in (*WORKER_MODULES, *arguments.modules):
        if not module.startswith("dtrain."):
            offer_current_folder()
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in what is forked would copy every object imported here
    if threads_lost_by_fork():
        sys.exit(f"{' '.join(arguments.modules)} started threads, which a fork would lose")
    channel.send({"ready": os.getpid()})
    _Server(channel).serve()
    os._exit(0)  # what it forked is killed by the kernel


class _Server:
    """Forks what is asked for, passes signals on, and tells how each ended."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._nodes: set[int] = set()
        self._wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Until the other end is closed."""
        while True:
            select.select([self._channel.fileno(), self._wake], [], [])
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 512)
            self._reap()
            try:
                request, files = self._channel.receive_with_files()
            except EOFError:
                return
            if request is not None:
                self._answer(request, files)

    def _answer(self, request: dict[str, Any], files: list[int]) -> None:
        if "start" not in request:
            if request["pid"] in self._nodes:
                kill_group(request["pid"], request["signal"])
            return
        log, *listener = files
        argv = request["start"]
        for fd in listener:
            argv = [*argv, "--listen-fd", str(fd)]
        pid = fork_child(
            lambda: _become_node(argv, request["env"]), stdout=log, stderr=log, keep_fds=listener
        )
        for fd in files:
            os.close(fd)
        self._nodes.add(pid)
        self._channel.send({"started": pid})

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                self._nodes.discard(pid)
                self._channel.send({"exited": pid, "code": os.waitstatus_to_exitcode(status)})


def _become_node(argv: list[str], env: dict[str, str]) -> int:
    """Be what `python -m dtrain.node` would be after its imports."""
    import numpy as np

    os.environ.clear()
    os.environ.update(env)
    sys.argv = [node.__file__, *argv]
    random.seed()  # else the same numbers in every launch, which would hide that nobody seeds them
    np.random.seed()
    node.main(argv)
    return 0


if __name__ == "__main__":
    main()
