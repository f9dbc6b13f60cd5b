"""The head's side of the store: one thread, which answers who has proven the token."""

from __future__ import annotations

import errno
import json
import logging
import secrets
import selectors
import socket
import threading
import time
import weakref
from typing import cast

from dtrain.node.sealed import (
    FRAME,
    FROM_HEAD,
    GREETING,
    MAGIC,
    MOST,
    NONCE,
    PROVE_WITHIN_S,
    TO_HEAD,
    Seal,
    Table,
)

log = logging.getLogger(__name__)

_MOST_OF_A_STRANGER = 1 << 10
_STRANGERS = 512
"""Connections that have proven nothing yet; of more, the oldest goes."""


class Server:
    """Serves a table on a socket that listens already, from a thread, for as long as it is kept."""

    def __init__(self, listener: socket.socket, run_id: str, token: bytes) -> None:
        self.table = Table()
        ours, theirs = socket.socketpair()
        loop = _Loop(listener, theirs, self.table, run_id, token)
        self._thread = threading.Thread(target=loop.run, name="store", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, ours.close)

    def close(self) -> None:
        """Hang up on everybody."""
        self._end()
        self._thread.join()


class _Loop:
    """What the server's thread does."""

    def __init__(
        self, listener: socket.socket, end: socket.socket, table: Table, run_id: str, token: bytes
    ) -> None:
        listener.setblocking(False)
        self._listener, self._end = listener, end
        self._table, self._run_id, self._token = table, run_id.encode(), token
        self._strangers: dict[_Guest, None] = {}
        self._has_told = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve until the other end of `end` is closed."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._end, selectors.EVENT_READ)
        while True:
            for key, ready in self._selector.select(1.0):
                if key.fileobj is self._end:
                    self._close()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data.sock.fileno() >= 0:  # not dropped just now
                    self._hear(key.data, ready)
            now = time.monotonic()
            for guest in [g for g in self._strangers if now - g.since > PROVE_WITHIN_S]:
                self._drop(guest, "nothing was proven")

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # for one of those that we have to end
            return
        guest = _Guest(sock, str(address[0]), self._table, self._token)
        self._strangers[guest] = None
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, guest)
        guest.greet(self._run_id)
        if len(self._strangers) > _STRANGERS:
            self._drop(next(iter(self._strangers)), "there were too many")

    def _hear(self, guest: _Guest, ready: int) -> None:
        try:
            guest.go_on(ready)
        except (OSError, ValueError, TypeError) as error:
            self._drop(guest, str(error))
            return
        if guest.is_proven:
            self._strangers.pop(guest, None)
        if bool(guest.outgoing) != guest.is_watched_for_room:
            guest.is_watched_for_room = not guest.is_watched_for_room
            writes = selectors.EVENT_WRITE if guest.outgoing else 0
            self._selector.modify(guest.sock, selectors.EVENT_READ | writes, guest)

    def _drop(self, guest: _Guest, why: str) -> None:
        if guest in self._strangers:
            del self._strangers[guest]
            if guest.has_spoken and not self._has_told:
                self._has_told = True  # once: a stranger must not fill our disk
                log.warning("refused a connection from %s: %s", guest.address, why)
        self._selector.unregister(guest.sock)
        guest.sock.close()

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()
        self._selector.close()


class _Guest:
    """A connection of the server's: a stranger, until its first message has proven the token."""

    def __init__(self, sock: socket.socket, address: str, table: Table, token: bytes) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.address = address
        self.since = time.monotonic()
        self.outgoing = b""
        self.has_spoken = False
        self.is_watched_for_room = True
        """Whether the loop waits until more can be sent."""
        self._incoming = bytearray()
        self._table, self._token = table, token
        self._nonce = secrets.token_bytes(NONCE)
        self._seal: Seal | None = None
        self._number = 0

    @property
    def is_proven(self) -> bool:
        """Whether it has the token."""
        return self._number > 0

    def greet(self, run_id: bytes) -> None:
        """Say the first words."""
        self.outgoing = GREETING.pack(MAGIC, self._nonce, len(run_id)) + run_id

    def go_on(self, ready: int) -> None:
        """Take in what came, and send what fits.

        Raises:
            OSError: it has gone.
            ValueError: it does not have the token.
        """
        if ready & selectors.EVENT_READ:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("it was closed at the other end")
            self.has_spoken = True
            self._incoming += data
            while self._answer_next():
                pass
        if self.outgoing:
            self.outgoing = self.outgoing[self.sock.send(self.outgoing) :]

    def _answer_next(self) -> bool:
        """Answer the next message; False when it is not all there yet."""
        if self._seal is None:
            if len(self._incoming) < NONCE:
                return False
            self._seal = Seal(self._token, self._nonce + self._take(NONCE))
        if len(self._incoming) < FRAME.size:
            return False
        length, mac = FRAME.unpack_from(self._incoming)
        if length > (MOST if self.is_proven else _MOST_OF_A_STRANGER):
            raise ValueError("it does not speak as an agent of this launch does")
        if len(self._incoming) < FRAME.size + length:
            return False
        text = self._take(FRAME.size + length)[FRAME.size :]
        if not self._seal.fits(mac, TO_HEAD, self._number, text):
            raise ValueError("it does not have this launch's token")
        answer = json.dumps(self._table.answer(json.loads(text))).encode()
        self.outgoing += self._seal.packed(FROM_HEAD, self._number, answer)
        self._number += 1
        return True

    def _take(self, size: int) -> bytes:
        data = bytes(self._incoming[:size])
        del self._incoming[:size]
        return data
