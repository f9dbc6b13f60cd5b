"""The store where the agents of a run meet. The head serves it only to agents of the same run.

torch's TCPStore trusts any process that reaches its port. Here both sides of a connection begin
with a random number. Every message carries a keyed hash (BLAKE2b) of its direction, its position in
the sequence and its text. The key comes from the token of the attempt and both numbers. So no
message can be forged, repeated, or moved to another position or connection. No other part of a
message is read before its hash is checked. The connection of a process that does not know the
token, is closed.
"""

from __future__ import annotations

import abc
import errno
import hmac
import json
import logging
import secrets
import selectors
import socket
import struct
import threading
import time
import weakref
from hashlib import blake2b
from typing import Any, cast

from torch.distributed import DistError

log = logging.getLogger(__name__)

MAGIC = b"dtrain-1"
NONCE = 16
GREETING = struct.Struct(f"!8s{NONCE}sH")  # and the run's id, with this number of bytes
FRAME = struct.Struct("!I16s")  # length and hash of the text that follows
MAX_BYTES = 1 << 26
PROVE_WITHIN_S = 10.0
_SILENCE_S = 30.0
"""The time after which a head that does not answer counts as gone."""
TO_HEAD, FROM_HEAD = b">", b"<"
_MAX_UNPROVEN_BYTES = 1 << 10
_MAX_UNPROVEN = 512
"""The most connections that have proven nothing yet. Beyond that, the oldest is closed."""


class HeadGone(DistError):
    """The head no longer answers, or the process that answers is not the head."""


class Store(abc.ABC):
    @abc.abstractmethod
    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins with 0. Return its new value."""

    @abc.abstractmethod
    def set(self, key: str, text: str) -> None:
        """Set the text of a key."""

    @abc.abstractmethod
    def get_all(self, keys: list[str]) -> list[str | None]:
        """Return the texts of several keys, counters as digits.

        None for each key without a text yet.
        """

    @abc.abstractmethod
    def clone(self) -> Store:
        """Return the same store for another thread.

        Its calls do not wait for answers to this one's.
        """

    def get(self, key: str) -> str | None:
        """Return the text of a key. None when there is none yet."""
        return self.get_all([key])[0]


class Table(Store):
    """The table of the head, which its own agent reads directly."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            count = int(self._texts.get(key, 0)) + amount
            self._texts[key] = str(count)
            return count

    def set(self, key: str, text: str) -> None:
        with self._lock:
            self._texts[key] = text

    def get_all(self, keys: list[str]) -> list[str | None]:
        with self._lock:
            return [self._texts.get(key) for key in keys]

    def clone(self) -> Table:
        return self

    def answer(self, request: list[Any]) -> Any:
        match request:
            case ["add", str(key), int(amount)]:
                return self.add(key, amount)
            case ["set", str(key), str(text)]:
                return self.set(key, text)
            case ["get_all", list(keys)]:
                return self.get_all(keys)
        raise ValueError(f"unknown request: {request[:1]}")


class Remote(Store):
    """The head's table, accessed from another process."""

    def __init__(self, address: tuple[str, int], token: bytes, sock: socket.socket) -> None:
        """Take over a connection.

        Args:
            address: the host and port of the head.
            token: the token of the attempt.
            sock: a socket connected to the head. Its timeout is for the head's greeting.

        Raises:
            OSError: no head answers.
        """
        self._address = address
        self._token = token
        self._lock = threading.Lock()
        self._connection: _Connection | None = _Connection(sock, token)
        self.run_id = self._connection.run_id
        """The run id of the process that answers, before anything is proven."""

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def set(self, key: str, text: str) -> None:
        self._ask("set", key, text)

    def get_all(self, keys: list[str]) -> list[str | None]:
        return list(self._ask("get_all", keys))

    def clone(self) -> Remote:
        try:
            sock = socket.create_connection(self._address, PROVE_WITHIN_S)
            return Remote(self._address, self._token, sock)
        except OSError as error:
            raise HeadGone(str(error)) from error

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            connection, self._connection = self._connection, None
            try:
                if connection is None:  # a signal came before the last answer
                    sock = socket.create_connection(self._address, PROVE_WITHIN_S)
                    connection = _Connection(sock, self._token)
                answer = connection.ask(request)
            except OSError as error:
                raise HeadGone(str(error)) from error
            self._connection = connection
        return answer


class _Connection:
    def __init__(self, sock: socket.socket, token: bytes) -> None:
        """Exchange greetings. Raise OSError if the process that answers is not a head."""
        self._sock = sock
        self._number = 0
        weakref.finalize(self, sock.close)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            magic, nonce, length = GREETING.unpack(self._exactly(GREETING.size))
            if magic != MAGIC:
                raise ConnectionError("the process at this address is not dtrain")
            self.run_id = self._exactly(length).decode(errors="replace")
            own_nonce = secrets.token_bytes(NONCE)
            sock.sendall(own_nonce)
            sock.settimeout(_SILENCE_S)
        except BaseException:
            sock.close()
            raise
        self._seal = Seal(token, nonce + own_nonce)

    def ask(self, request: tuple[Any, ...]) -> Any:
        """Return the answer. Without one, the connection is closed."""
        try:
            text = json.dumps(request).encode()
            self._sock.sendall(self._seal.pack(TO_HEAD, self._number, text))
            length, mac = FRAME.unpack(self._exactly(FRAME.size))
            text = self._exactly(min(length, MAX_BYTES))
            if not self._seal.is_valid(mac, FROM_HEAD, self._number, text):
                raise ConnectionError("the process at this address has another token")
        except BaseException:
            self._sock.close()
            raise
        self._number += 1
        return json.loads(text)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise ConnectionError("the connection was closed at the other end")
            data += more
        return bytes(data)


class Server:
    """The head's side: serves a table on a socket that already listens, while this object exists.

    One thread answers all clients that have proven the token.
    """

    def __init__(self, listener: socket.socket, run_id: str, token: bytes) -> None:
        self.table = Table()
        own_end, loop_end = socket.socketpair()
        loop = _Loop(listener, loop_end, self.table, run_id, token)
        self._thread = threading.Thread(target=loop.run, name="store", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, own_end.close)

    def close(self) -> None:
        self._end()
        self._thread.join()


class _Loop:
    def __init__(
        self, listener: socket.socket, end: socket.socket, table: Table, run_id: str, token: bytes
    ) -> None:
        listener.setblocking(False)
        self._listener, self._end = listener, end
        self._table, self._run_id, self._token = table, run_id.encode(), token
        self._unproven: dict[_Client, None] = {}
        self._has_warned = False
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
                    self._serve(key.data, ready)
            now = time.monotonic()
            for client in [each for each in self._unproven if now - each.since > PROVE_WITHIN_S]:
                self._drop(client, "it did not authenticate in time")

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # until one of the present connections ends
            return
        client = _Client(sock, str(address[0]), self._table, self._token)
        self._unproven[client] = None
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, client)
        client.greet(self._run_id)
        if len(self._unproven) > _MAX_UNPROVEN:
            self._drop(next(iter(self._unproven)), "there were too many connections")

    def _serve(self, client: _Client, ready: int) -> None:
        try:
            client.process(ready)
        except (OSError, ValueError, TypeError) as error:
            self._drop(client, str(error))
            return
        if client.is_proven:
            self._unproven.pop(client, None)
        if bool(client.outgoing) != client.waits_to_send:
            client.waits_to_send = not client.waits_to_send
            writes = selectors.EVENT_WRITE if client.outgoing else 0
            self._selector.modify(client.sock, selectors.EVENT_READ | writes, client)

    def _drop(self, client: _Client, why: str) -> None:
        if client in self._unproven:
            del self._unproven[client]
            if client.has_sent and not self._has_warned:
                self._has_warned = True  # once: such a process must not fill the disk
                log.warning("refused a connection from %s: %s", client.address, why)
        self._selector.unregister(client.sock)
        client.sock.close()

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()
        self._selector.close()


class _Client:
    """A connection of the server, unproven until its first message has proven the token."""

    def __init__(self, sock: socket.socket, address: str, table: Table, token: bytes) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.address = address
        self.since = time.monotonic()
        self.outgoing = b""
        self.has_sent = False
        self.waits_to_send = True
        """True while the loop waits until more can be sent."""
        self._incoming = bytearray()
        self._table, self._token = table, token
        self._nonce = secrets.token_bytes(NONCE)
        self._seal: Seal | None = None
        self._number = 0

    @property
    def is_proven(self) -> bool:
        return self._number > 0

    def greet(self, run_id: bytes) -> None:
        self.outgoing = GREETING.pack(MAGIC, self._nonce, len(run_id)) + run_id

    def process(self, ready: int) -> None:
        """Read what came, and send what fits.

        Raises:
            OSError: the client has gone.
            ValueError: it does not have the token.
        """
        if ready & selectors.EVENT_READ:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("it was closed at the other end")
            self.has_sent = True
            self._incoming += data
            while self._answer_next():
                pass
        if self.outgoing:
            self.outgoing = self.outgoing[self.sock.send(self.outgoing) :]

    def _answer_next(self) -> bool:
        """Answer the next message. Return False when it is not complete yet."""
        if self._seal is None:
            if len(self._incoming) < NONCE:
                return False
            self._seal = Seal(self._token, self._nonce + self._take(NONCE))
        if len(self._incoming) < FRAME.size:
            return False
        length, mac = FRAME.unpack_from(self._incoming)
        if length > (MAX_BYTES if self.is_proven else _MAX_UNPROVEN_BYTES):
            raise ValueError("its first message is too long for an agent of this launch")
        if len(self._incoming) < FRAME.size + length:
            return False
        text = self._take(FRAME.size + length)[FRAME.size :]
        if not self._seal.is_valid(mac, TO_HEAD, self._number, text):
            raise ValueError("it does not have this launch's token")
        answer = json.dumps(self._table.answer(json.loads(text))).encode()
        self.outgoing += self._seal.pack(FROM_HEAD, self._number, answer)
        self._number += 1
        return True

    def _take(self, size: int) -> bytes:
        data = bytes(self._incoming[:size])
        del self._incoming[:size]
        return data


class Seal:
    """Makes and checks the hashes of one connection's messages."""

    def __init__(self, token: bytes, nonces: bytes) -> None:
        self._key = blake2b(nonces, key=token, digest_size=32).digest()

    def pack(self, direction: bytes, number: int, text: bytes) -> bytes:
        """Return a message in its sent form: as number N of its direction."""
        return FRAME.pack(len(text), self._hash(direction, number, text)) + text

    def is_valid(self, mac: bytes, direction: bytes, number: int, text: bytes) -> bool:
        """Return whether a process with the token sent exactly this message."""
        return hmac.compare_digest(mac, self._hash(direction, number, text))

    def _hash(self, direction: bytes, number: int, text: bytes) -> bytes:
        data = direction + number.to_bytes(8, "big") + text
        return blake2b(data, key=self._key, digest_size=16).digest()
