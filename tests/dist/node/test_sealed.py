"""The agents' store hears only those who have the token of the attempt."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistError, TCPStore

from dtrain import ports
from dtrain.node import sealed
from dtrain.node.sealed import HeadGone, Remote, Server
from support.launch import until

TOKEN = b"t" * 32


@pytest.fixture
def head() -> Iterator[tuple[Server, tuple[str, int]]]:
    listener = ports.listen("127.0.0.1", 0)
    place = ("127.0.0.1", int(listener.getsockname()[1]))
    server = Server(listener, "run/0", TOKEN)
    yield server, place
    server.close()


Head = tuple[Server, tuple[str, int]]


def connect(place: tuple[str, int], token: bytes = TOKEN) -> Remote:
    return Remote(place, token, socket.create_connection(place, 10))


def test_who_has_the_token_is_answered(head: Head) -> None:
    server, place = head
    store = connect(place)
    assert (store.add("n", 2), store.add("n", 0), server.table.add("n", 1)) == (2, 2, 3)
    store.set("a", long := "é" * 1_000_000)
    assert server.table.get("a") == store.clone().get("a") == long
    assert store.get_all(["a", "b"]) == [long, None]
    assert store.run_id == "run/0"


def _wrong_token(place: tuple[str, int]) -> None:
    with pytest.raises(HeadGone):
        connect(place, b"x" * 32).set("closed", "{}")


def _torch(place: tuple[str, int]) -> None:
    with pytest.raises(DistError):
        TCPStore(*place, is_master=False, timeout=timedelta(seconds=1)).set("closed", "{}")


def _sends(*parts: bytes) -> Callable[[tuple[str, int]], None]:
    """Says something, and waits until it is hung up on."""

    def send(place: tuple[str, int]) -> None:
        with socket.create_connection(place, 10) as sock:
            for part in parts:
                sock.sendall(part)
            with closing(sock.makefile("rb")) as file:
                file.read()

    return send


STRANGERS = {
    "another token": _wrong_token,
    "torch's own store": _torch,
    "a browser": _sends(b"GET / HTTP/1.1\r\nHost: gpu-a\r\n\r\n" + b"x" * 100),
    "an endless message": _sends(bytes(16), b"\xff" * 20),
    "no hash": _sends(bytes(16), sealed.FRAME.pack(2, bytes(16)) + b"[]"),
    "no JSON": _sends(bytes(16), sealed.FRAME.pack(2, bytes(16)) + b"\x80."),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_changes_nothing_and_is_told_of_once(
    head: Head, stranger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, place = head
    friend = connect(place)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stranger(place)
        until("the refusal", lambda: caplog.records)
    assert (friend.get("closed"), friend.add("closers", 0)) == (None, 0)
    assert [record.args[0] for record in caplog.records] == ["127.0.0.1"]  # type: ignore[index]
    assert server.table.get("closed") is None


@contextmanager
def overheard(place: tuple[str, int]) -> Iterator[tuple[Remote, list[bytes]]]:
    """A friend's connection to the head, and all that the friend says there."""
    said: list[bytes] = []
    sock = socket.create_connection(place, 10)

    class Tapped(socket.socket):
        def sendall(self, data: Any, *flags: int) -> None:
            said.append(bytes(data))
            super().sendall(data, *flags)

    tapped = Tapped(fileno=sock.detach())
    tapped.settimeout(10)
    yield Remote(place, TOKEN, tapped), said


def test_what_was_overheard_can_not_be_said_again(head: Head) -> None:
    _, place = head
    with overheard(place) as (friend, said):
        friend.add("closers", 1)
        nonce, message = said
        _sends(nonce, message)(place)  # on a connection of one's own
        connection = friend._connection
        assert connection is not None
        connection._sock.sendall(message)  # on theirs, as who can write into it might
        with pytest.raises(HeadGone):
            friend.get("closers")
    assert connect(place).add("closers", 0) == 1


def test_a_head_without_the_token_is_not_believed() -> None:
    listener = ports.listen("127.0.0.1", 0)
    place = ("127.0.0.1", int(listener.getsockname()[1]))
    server = Server(listener, "run/0", b"x" * 32)
    server.table.set("closed", "by a stranger")
    with closing(server), pytest.raises(HeadGone):
        connect(place).get("closed")


def test_connections_that_prove_nothing_do_not_keep_others_out(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = head
    monkeypatch.setattr(sealed, "_MAX_UNPROVEN", 3)
    idle = [socket.create_connection(place, 10) for _ in range(10)]
    try:
        assert connect(place).add("n", 1) == 1
        assert connect(place).add("n", 1) == 2
    finally:
        for sock in idle:
            sock.close()


def test_silence_is_hung_up_on(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    _, place = head
    monkeypatch.setattr(sealed, "PROVE_WITHIN_S", 0.1)
    _sends()(place)
    assert connect(place).add("n", 1) == 1


class _Asked(Exception):
    """By a signal."""


def test_an_answer_cut_off_by_a_signal_is_not_taken_for_the_next(head: Head) -> None:
    server, place = head
    store = connect(place)
    store.add("n", 5)

    def ask(_number: int, _frame: object) -> None:
        raise _Asked

    before = signal.signal(signal.SIGALRM, ask)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with server.table._lock, pytest.raises(_Asked):
            store.add("n", 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    store.set("closed", "asked to stop")
    assert (store.get("closed"), store.add("other", 1)) == ("asked to stop", 1)
