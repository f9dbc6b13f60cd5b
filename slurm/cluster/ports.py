"""Which ports a cluster takes whose nodes share the machine's network."""

from __future__ import annotations

import os
import socket

from cluster.spec import ClusterError

_FIRST, _LAST, _STEP = 16800, 30000, 150
"""Below the kernel's own choices (from 32768 on), so that no client happens to sit there."""


def choose_ports(asked: int | None, nodes: int) -> int:
    """The first of a free row of ports: the one asked for, or any."""
    if asked is not None:
        busy = _first_busy(asked, nodes)
        if busy is not None:
            raise ClusterError(
                f"port {busy} is busy; with --port {asked} the cluster takes {asked} to "
                f"{asked + 9 + nodes}. Take another, or leave --port away."
            )
        return asked
    rows = range(_FIRST, _LAST, _STEP)
    begin = os.getpid() % len(rows)  # clusters started at once look at different ones
    for row in range(len(rows)):
        first = rows[(begin + row) % len(rows)]
        if _first_busy(first, nodes) is None:
            return first
    raise ClusterError(f"no {10 + nodes} free ports in a row from {_FIRST} to {_LAST}")


def _first_busy(first: int, nodes: int) -> int | None:
    """Held by anybody, on any address."""
    ports = [*range(first, first + 4), *range(first + 10, first + 10 + nodes)]
    return next((port for port in ports if not _free(port)), None)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
