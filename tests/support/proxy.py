"""A proxy in front of an HTTP server, which makes the faults of a bad network."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Fault = Literal["slow", "500", "503", "404", "cut-request", "cut-answer", "away"]
_ERRORS = {"500": "InternalError", "503": "SlowDown", "404": "NoSuchUpload"}
_PIECE, _PIECE_S = 1 << 17, 0.01
"""How many bytes pass at once, and how long the slow proxy waits after them: 13 MB/s."""


@dataclass(frozen=True)
class Seen:
    """A request that reached the proxy."""

    method: str
    path: str
    chunk: str
    """The number of the chunk that it uploads, or the range that it downloads."""
    completes: bool
    """Whether it completes the upload of chunks."""
    lists: str
    """The last directory of the path that it lists."""

    def is_of(self, step: int) -> bool:
        """Whether it is about the checkpoint of this step."""
        name = f"step-{step:08d}"
        return f"/{name}/" in self.path or self.lists == name


class Proxy:
    """The proxy. It is a context manager.

    Args:
        upstream: the URL of the server.

    Attributes:
        fault: returns the fault to make, given a request and how often it was seen before.
        seen: how often each request was seen.
        faults: how often each request met a fault other than `slow`.
    """

    def __init__(self, upstream: str) -> None:
        self.fault: Callable[[Seen, int], Fault | None] = lambda *_: None
        self.seen: Counter[Seen] = Counter()
        self.faults: Counter[Seen] = Counter()
        self.upstream = urlsplit(upstream).netloc
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def meet(self, request: Seen) -> Fault | None:
        """Count a request, and return its fault."""
        with self._lock:
            fault = self.fault(request, self.seen[request])
            self.seen[request] += 1
            if fault not in (None, "slow"):
                self.faults[request] += 1
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that `server_close` joins them

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy
        self.connections: set[socket.socket] = set()

    def server_close(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the client has gone
            super().handle()

    def _pass(self) -> None:
        """Pass a request on to the server, and its answer back, unless a fault is due."""
        fault = self.server.proxy.meet(_seen(self.command, self.path, self.headers["Range"]))
        size = int(self.headers.get("Content-Length", 0))
        if fault == "away":
            self._cut()
        elif fault == "cut-request":
            self._receive(size // 2, fault)
            self._cut()
        elif fault in _ERRORS:
            self._receive(size, fault)
            text = f"<Error><Code>{_ERRORS[fault]}</Code><Message>a fault</Message></Error>"
            self._send(int(fault), {}, text.encode(), fault)
        else:
            self._send(*self._ask(self._receive(size, fault)), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()

    def _receive(self, size: int, fault: Fault | None) -> bytes:
        body = bytearray()
        while len(body) < size:
            piece = self.rfile.read(min(_PIECE, size - len(body)))
            if not piece:
                raise ConnectionError("the client has gone")
            body += piece
            self._pause(fault)
        return bytes(body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None) -> None:
        if fault == "cut-answer" and not body:
            self._cut()
            return
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body))
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in ("Connection", "Transfer-Encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut-answer":
            body = body[: len(body) // 2]
        for at in range(0, len(body), _PIECE):
            self.wfile.write(body[at : at + _PIECE])
            self._pause(fault)
        if fault == "cut-answer":
            self._cut()

    def _pause(self, fault: Fault | None) -> None:
        if fault == "slow":
            time.sleep(_PIECE_S)  # this is the fault

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _seen(method: str, target: str, piece: str | None) -> Seen:
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    chunk = query.get("partNumber", [piece or ""])[0]
    listed = query.get("prefix", [""])[0].rstrip("/").rpartition("/")[2]
    return Seen(method, parts.path, chunk, method == "POST" and "uploadId" in query, listed)
