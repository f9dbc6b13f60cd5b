"""The process that imported torch once and forks the ranks.

It has one thread for as long as it lives. It ends when its caller does, and its ranks with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dtrain.testing import body, client
from dtrain.testing.watch import Run
from dtrain.testing.wire import Channel

if TYPE_CHECKING:
    import pytest

_TICK_S = 1.0
_PR_SET_CHILD_SUBREAPER = 36

_has_main = False


def serve(channel: Channel, parent: int, items: Mapping[str, pytest.Function]) -> int:
    """Answer requests until the caller is gone.

    Args:
        channel: to the caller.
        parent: the caller's pid.
        items: the tests that can be run, by node id.

    Returns:
        The exit status of the process.
    """
    _settle()
    inherited = open_fds() - {channel.fileno()}
    channel.send(b"ready")
    while True:
        try:
            message = channel.receive(_TICK_S)
        except TimeoutError:
            # The end of the channel is not seen while a child of the caller's holds a copy.
            if os.getppid() != parent:
                return 0
            continue
        if message is None:
            return 0
        if message == b"cancel":
            continue
        request, main = pickle.loads(message)
        _import_main(main)
        with Run(request, items, inherited) as run:
            answer = run.until_done(channel, parent)
        channel.send(pickle.dumps(answer))


def main(fd: int, parent: int) -> None:
    """Serve on the socket `fd`, in an interpreter of its own."""
    sys.exit(serve(Channel(socket.socket(fileno=fd)), parent, {}))


def _settle() -> None:
    """Import what ranks need, fix the standard streams, adopt what ranks leave behind."""
    if "torch" not in sys.modules:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    body.forget_pytest_logging()
    faulthandler.disable()
    streams = [open(os.devnull), *(open(fd, "w", 1, "utf-8", closefd=False) for fd in (1, 2))]  # noqa: SIM115
    os.dup2(streams[0].fileno(), 0)
    sys.stdin, sys.stdout, sys.stderr = streams
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import torch._dynamo  # DDP's first step would: 2.6 s in every rank
        import torch.distributed
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # ranks do not copy the pages of what the collector would touch


def _import_main(data: dict[str, Any] | None) -> None:
    """Import the caller's script, as multiprocessing does, so that its functions are found."""
    global _has_main
    if data is None or _has_main:
        return
    from multiprocessing import spawn

    client.importing_main = _has_main = True
    try:
        spawn.prepare(data)
    finally:
        client.importing_main = False


def open_fds() -> set[int]:
    """The descriptors open in this process."""
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in listed if os.path.exists(f"/proc/self/fd/{fd}")}
