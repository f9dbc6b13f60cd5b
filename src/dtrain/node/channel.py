"""Messages between a process that forks others and who asks it to, over a socket pair.

One JSON object a message; SOCK_SEQPACKET keeps their bounds.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any

SERVER_ENDED = "the node's fork server has ended"
"""An agent's last words when that is why it ends; the server's own say more."""
_LARGEST = 1 << 20
_MOST_FILES = 8


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

    def send(self, message: dict[str, Any], files: Sequence[int] = ()) -> None:
        """Send one message, and descriptors with it; `OSError` when the other end is gone."""
        self.sock.setblocking(True)
        try:
            socket.send_fds(self.sock, [json.dumps(message).encode()], files)
        finally:
            self.sock.setblocking(False)

    def offer(self, message: dict[str, Any]) -> None:
        """Send one message if there is room for it now; of another thread than all the rest."""
        with contextlib.suppress(BlockingIOError):
            self.sock.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when there is none yet.

        Raises:
            EOFError: the other end is gone.
        """
        return self.receive_with_files()[0]

    def receive_with_files(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message as `receive` has it, and the descriptors that came with it."""
        try:
            raw, files, _, _ = socket.recv_fds(self.sock, _LARGEST, _MOST_FILES)
        except BlockingIOError:
            return None, []
        except ConnectionResetError as error:
            raise EOFError from error
        if not raw:
            raise EOFError
        return json.loads(raw), files

    def close(self) -> None:
        """Close this end."""
        self.sock.close()
