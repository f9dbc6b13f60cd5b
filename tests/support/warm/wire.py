"""How a process is asked of the warm server. It imports nothing but the standard library."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence

LARGEST = 1 << 20


def request(
    address: str,
    module: str,
    arguments: Sequence[str],
    *,
    cwd: str | os.PathLike[str],
    env: Mapping[str, str],
    files: Mapping[int, int],
    enter: bool = False,
) -> tuple[socket.socket, int]:
    """Have the server run `python -m MODULE ARGUMENTS`.

    Args:
        address: path of the server's socket.
        module: as after `python -m`.
        arguments: of the module.
        cwd: its directory.
        env: its environment.
        files: descriptors: its number → ours.
        enter: whether it runs in our namespaces, and dies with us.

    Returns:
        Where its end is told, see `exit_code`, and its pid. It is killed when this connection ends.
    """
    told = {"module": module, "arguments": list(arguments), "cwd": os.fspath(cwd),
            "env": dict(env), "numbers": list(files), "enter": enter}  # fmt: skip
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(told).encode()], list(files.values()))
    return connection, _receive(connection)["pid"]


def exit_code(connection: socket.socket) -> int:
    """Wait for the end of a process; its exit code, negative for a signal."""
    return _receive(connection)["code"]


def _receive(connection: socket.socket) -> dict[str, int]:
    try:
        data = connection.recv(LARGEST)
    except ConnectionResetError:
        data = b""
    if not data:
        raise ConnectionError("the warm server has ended")
    return dict(json.loads(data))
