"""Checks of the network of a host: names, the interface that leads to the others, ports."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from dtrain import ports
from dtrain.doctor.asked import Asked
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis

_ELSEWHERE = ("203.0.113.1", 9)
"""An address that no host has (RFC 5737). It only selects the route to other networks."""
_SLOW_S = 1.0
_RESOLVE_S = 1.5  # five queries in a row at most: together with them a preflight stays under 10 s
_CONNECT_S = 3.0
_SELECTED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


@dataclass(frozen=True)
class Answer:
    """The answer to a query of a name or an address."""

    text: str
    """The address or the name; or why there is none."""
    is_known: bool
    seconds: float


def names(_asked: Asked) -> Diagnosis:
    """Return whether this host's name and its address are resolved, and without delay."""
    own = socket.gethostname()
    forward, back = resolve(own), name_of(own_address())
    if not forward.is_known:
        return name_not_known(own, own, forward)
    named = f", and {own_address()} is {back.text}" if back.is_known else ""
    return slow_names(own, forward, back) or Diagnosis(
        "names", OK, f"{own} is {forward.text}{named}"
    )


def name_not_known(host: str, name: str, answer: Answer) -> Diagnosis:
    """Return the finding of a host that cannot resolve a name. dtrain itself uses addresses."""
    remedy = f"add {name} to the name server, or to /etc/hosts of {host}"
    return Diagnosis("names", WARNING, f"{host} cannot resolve {name}: {answer.text}", remedy)


def slow_names(host: str, *answers: Answer) -> Diagnosis | None:
    """Return the finding of a host whose name servers are slow; None if they are not."""
    slowest = max(answer.seconds for answer in answers)
    if slowest <= _SLOW_S:
        return None
    fact = f"a name takes {host} {slowest:.1f} s, and torch asks for one with each connection"
    remedy = "--env RES_OPTIONS='timeout:1 attempts:1', or correct /etc/resolv.conf there"
    return Diagnosis("names", WARNING, fact, remedy)


def resolve(name: str) -> Answer:
    """Return the address of a name."""
    return _ask(lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def name_of(address: str) -> Answer:
    """Return the name of an address."""
    return _ask(lambda: socket.getnameinfo((address, 0), socket.NI_NAMEREQD)[0])


def _ask(query: Callable[[], object]) -> Answer:
    """Make a query in a thread, because the library has no time limit."""
    answers: list[Answer] = []
    began = time.monotonic()

    def ask() -> None:
        try:
            text, is_known = str(query()), True
        except (OSError, UnicodeError) as error:
            text, is_known = str(error), False
        answers.append(Answer(text, is_known, time.monotonic() - began))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_RESOLVE_S)
    silent = Answer(f"no answer within {_RESOLVE_S:g} s", False, _RESOLVE_S)
    return answers[0] if answers else silent


def own_address() -> str:
    """Return the address of this host on the way to other networks, or that of loopback."""
    try:
        return ports.address_towards(*_ELSEWHERE)
    except OSError:
        return "127.0.0.1"


def interface(asked: Asked) -> Diagnosis:
    """Return the interface on which this host reaches the head, or other networks."""
    known = psutil.net_if_addrs()
    for variable in _SELECTED:
        wanted = asked.env.get(variable, os.environ.get(variable))
        if wanted and not _is_there(wanted, list(known)):
            fact = f"{variable}={wanted}, and this host has {', '.join(known)}"
            return Diagnosis("interface", PROBLEM, fact, f"unset {variable}; dtrain sets it itself")
    host, port = asked.head or _ELSEWHERE
    try:
        address = ports.address_towards(host, port)
    except OSError as error:
        if asked.head:
            fact = f"the head at {host} cannot be reached: {error.strerror or error}"
            return Diagnosis("interface", PROBLEM, fact, why_unreachable(host, port, error))
        if asked.hosts > 1:
            return Diagnosis("interface", WARNING, "there is no route to other hosts", "ip route")
        return Diagnosis("interface", OK, "there is no route to other hosts; one host needs none")
    found = ports.interface_of(address)
    towards = f"the head at {host}" if asked.head else "other hosts"
    return Diagnosis("interface", OK, f"{found} ({address}) leads to {towards}")


def _is_there(wanted: str, known: list[str]) -> bool:
    """Return whether an interface exists. NCCL takes several, `=` for exact names, `^` for not."""
    if wanted.startswith("^"):
        return True
    prefixes = wanted.lstrip("=").split(",")
    return any(name.startswith(prefix) for prefix in prefixes for name in known)


def own_ports(_asked: Asked) -> Diagnosis:
    """Return whether this host can connect to a port that it opens on its own address."""
    address = own_address()
    try:
        with ports.listen(address, 0) as listener:
            port = int(listener.getsockname()[1])
            began = time.perf_counter()
            socket.create_connection((address, port), _CONNECT_S).close()
    except OSError as error:
        fact = f"{address} cannot be reached from this host itself: {error}"
        return Diagnosis("ports", PROBLEM, fact, open_ports())
    took = time.perf_counter() - began
    return Diagnosis(
        "ports", OK, f"{address}:{port} was opened and reached in {1000 * took:.1f} ms"
    )


def open_ports() -> str:
    """Return what to do where a firewall is between two hosts."""
    return "allow all TCP ports between the nodes, for example `ufw allow from ADDRESS` on each"


def why_unreachable(host: str, port: int, error: OSError) -> str:
    """Return what to do when a node cannot reach the head, in one sentence."""
    own = socket.gethostname()
    if isinstance(error, socket.gaierror):
        return (
            f"{own} cannot resolve the name {host}: add it to the name server or to /etc/hosts "
            f"there, or give an address; `getent hosts {host}` checks it"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"{host} answers {own}, but nothing listens on port {port}: was node 0 started?"
    if isinstance(error, TimeoutError):
        return f"{own} gets no answer from {host}:{port}, as from behind a firewall: {open_ports()}"
    return f"{own} has no connection to {host}; `ip route get {host}` shows the route"
