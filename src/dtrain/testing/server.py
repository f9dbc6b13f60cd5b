"""The process that imported torch once and forks the ranks.

It exits when its caller does, and its ranks exit with it.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.forking import ONE_THREAD, Channel, Children, import_once
from dtrain.procs import become_subreaper
from dtrain.testing import body, wire
from dtrain.testing.watch import Run

if TYPE_CHECKING:
    import pytest

_TICK_S = 1.0


def serve(channel: Channel, parent: int, items: Mapping[str, pytest.Function]) -> int:
    """Answer requests until the caller exits.

    Args:
        channel: the channel to the caller.
        parent: the caller's pid.
        items: the tests that can be run, by node id.

    Returns:
        The exit status of the process.
    """
    _prepare()
    inherited = open_fds() - {channel.fileno()}
    children = Children()
    has_main = False
    channel.send({"ready": os.getpid()})
    # The channel does not end while another child of the caller holds a copy of its descriptor.
    while os.getppid() == parent:
        try:
            message, files = channel.receive_with_files(_TICK_S)
        except EOFError:
            break
        if message is None or "run" not in message:
            continue
        request, main = wire.load(*files)
        if main is not None and not has_main:
            _import_main(main)
            has_main = True
        with Run(request, items, inherited, children) as run:
            answer = run.until_done(channel, parent)
        wire.send(channel, message, answer)
    return 0


def main(fd: int, parent: int) -> None:
    """Serve on the socket `fd`, in a separate interpreter."""
    sys.exit(serve(Channel(socket.socket(fileno=fd)), parent, {}))


def _prepare() -> None:
    """Import what ranks need, fix the standard streams, and adopt processes that ranks leave."""
    if "torch" not in sys.modules:
        for name, value in ONE_THREAD.items():
            os.environ.setdefault(name, value)
    body.forget_pytest_logging()
    faulthandler.disable()
    streams = [open(os.devnull), *(open(fd, "w", 1, "utf-8", closefd=False) for fd in (1, 2))]  # noqa: SIM115
    os.dup2(streams[0].fileno(), 0)
    sys.stdin, sys.stdout, sys.stderr = streams
    become_subreaper()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        torch.set_num_threads(1)
        # DDP's first step would import torch._dynamo: 2.6 s in every rank
        import_once(["torch._dynamo", "torch.distributed"])


def _import_main(data: dict[str, Any]) -> None:
    """Import the caller's script, as multiprocessing does, so that its functions are found."""
    from multiprocessing import spawn

    wire.is_importing_main = True
    try:
        spawn.prepare(data)
    finally:
        wire.is_importing_main = False


def open_fds() -> set[int]:
    """Return the descriptors that are open in this process."""
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}
