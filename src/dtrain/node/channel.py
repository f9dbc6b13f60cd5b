"""Messages between the fork server of a node and its agents, over a socket pair.

One JSON object a message; SOCK_SEQPACKET keeps their bounds.
"""

from __future__ import annotations

import json
import socket
from typing import Any

_LARGEST = 1 << 20


class Channel:
    """One end of the pair."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _LARGEST)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    def fileno(self) -> int:
        """For select and for keeping it open over a fork."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; `OSError` when the other end is gone."""
        self.sock.setblocking(True)
        try:
            self.sock.send(json.dumps(message).encode())
        finally:
            self.sock.setblocking(False)

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when there is none yet.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            raw = self.sock.recv(_LARGEST)
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise EOFError from error
        if not raw:
            raise EOFError
        message: dict[str, Any] = json.loads(raw)
        return message

    def close(self) -> None:
        """Close this end."""
        self.sock.close()
