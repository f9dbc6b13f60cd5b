"""The store at which the agents of a run meet: the head keeps it, and hears only its own.

torch's TCPStore believes whoever reaches its port. Here both sides of a connection begin with a
random number, and every message carries a keyed hash (BLAKE2b) of its direction, its place in the
sequence and its text. The key comes from the token of the attempt and both numbers, so that no
message can be forged, repeated, or moved to another place or connection. Nothing else of a message
is looked at before its hash has been: on a stranger, who does not know the token, we hang up.
"""

from __future__ import annotations

import abc
import hmac
import json
import secrets
import socket
import struct
import threading
import weakref
from hashlib import blake2b
from typing import Any

from torch.distributed import DistError

MAGIC = b"dtrain-1"
NONCE = 16
GREETING = struct.Struct(f"!8s{NONCE}sH")  # and the run's id, of so many bytes
FRAME = struct.Struct("!I16s")  # length and hash of the text that follows
MOST = 1 << 26
PROVE_WITHIN_S = 10.0
_SILENCE_S = 30.0
"""A head that answers nothing for so long is taken for gone."""
TO_HEAD, FROM_HEAD = b">", b"<"


class HeadGone(DistError):
    """The head does not answer any more, or what answers is not the head."""


class Store(abc.ABC):
    """Texts and counters by key."""

    @abc.abstractmethod
    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins with 0; what it is then."""

    @abc.abstractmethod
    def set(self, key: str, text: str) -> None:
        """Put a text there."""

    @abc.abstractmethod
    def get_all(self, keys: list[str]) -> list[str | None]:
        """The texts of several keys, counters as digits; None where there is none yet."""

    @abc.abstractmethod
    def clone(self) -> Store:
        """The same for another thread, of which no call waits for an answer to ours."""

    def get(self, key: str) -> str | None:
        """The text of a key; None when there is none yet."""
        return self.get_all([key])[0]


class Table(Store):
    """What the head keeps. Its own agent asks it directly."""

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
        """What is asked from another host."""
        match request:
            case ["add", str(key), int(amount)]:
                return self.add(key, amount)
            case ["set", str(key), str(text)]:
                return self.set(key, text)
            case ["get_all", list(keys)]:
                return self.get_all(keys)
        raise ValueError(f"a question that nobody asks: {request[:1]}")


class Remote(Store):
    """The head's table, asked from another process."""

    def __init__(self, place: tuple[str, int], token: bytes, sock: socket.socket) -> None:
        """Take over a connection.

        Args:
            place: host and port of the head.
            token: of the attempt.
            sock: connected to that; its timeout is for the head's first words.

        Raises:
            OSError: no head answers.
        """
        self._place = place
        self._token = token
        self._asking = threading.Lock()
        self._connection: _Connection | None = _Connection(sock, token)
        self.run_id = self._connection.run_id
        """That of whoever answers, before anything is proven."""

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def set(self, key: str, text: str) -> None:
        self._ask("set", key, text)

    def get_all(self, keys: list[str]) -> list[str | None]:
        return list(self._ask("get_all", keys))

    def clone(self) -> Remote:
        try:
            sock = socket.create_connection(self._place, PROVE_WITHIN_S)
            return Remote(self._place, self._token, sock)
        except OSError as error:
            raise HeadGone(str(error)) from error

    def _ask(self, *request: Any) -> Any:
        with self._asking:
            connection, self._connection = self._connection, None
            try:
                if connection is None:  # a signal came before the last answer
                    sock = socket.create_connection(self._place, PROVE_WITHIN_S)
                    connection = _Connection(sock, self._token)
                answer = connection.ask(request)
            except OSError as error:
                raise HeadGone(str(error)) from error
            self._connection = connection
        return answer


class _Connection:
    """To the head."""

    def __init__(self, sock: socket.socket, token: bytes) -> None:
        """Greet each other; OSError where it is no head that answers."""
        self._sock = sock
        self._number = 0
        weakref.finalize(self, sock.close)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            magic, nonce, length = GREETING.unpack(self._exactly(GREETING.size))
            if magic != MAGIC:
                raise ConnectionError("what answers there is not dtrain")
            self.run_id = self._exactly(length).decode(errors="replace")
            mine = secrets.token_bytes(NONCE)
            sock.sendall(mine)
            sock.settimeout(_SILENCE_S)
        except BaseException:
            sock.close()
            raise
        self._seal = Seal(token, nonce + mine)

    def ask(self, request: tuple[Any, ...]) -> Any:
        """The answer; where there is none, the connection is closed."""
        try:
            text = json.dumps(request).encode()
            self._sock.sendall(self._seal.packed(TO_HEAD, self._number, text))
            length, mac = FRAME.unpack(self._exactly(FRAME.size))
            text = self._exactly(min(length, MOST))
            if not self._seal.fits(mac, FROM_HEAD, self._number, text):
                raise ConnectionError("what answers there does not have this launch's token")
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


class Seal:
    """The hashes of one connection's messages."""

    def __init__(self, token: bytes, nonces: bytes) -> None:
        self._key = blake2b(nonces, key=token, digest_size=32).digest()

    def packed(self, way: bytes, number: int, text: bytes) -> bytes:
        """A message as it is sent: as number N of its direction."""
        return FRAME.pack(len(text), self._hash(way, number, text)) + text

    def fits(self, mac: bytes, way: bytes, number: int, text: bytes) -> bool:
        """Whether just this was sent, by who has the token."""
        return hmac.compare_digest(mac, self._hash(way, number, text))

    def _hash(self, way: bytes, number: int, text: bytes) -> bytes:
        said = way + number.to_bytes(8, "big") + text
        return blake2b(said, key=self._key, digest_size=16).digest()
