"""TCP ports that do not collide, and the network interface that leads to the head node."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

from dtrain.errors import LaunchError, quoted

_LOWEST, _HIGHEST = 15000, 32767
_TRIES = 64
_STREAM = socket.SOCK_STREAM


def candidates(key: str) -> Iterator[int]:
    """Yield ports to try for a key such as `run/attempt`, the same ones on every host.

    They are outside the range from which the kernel picks ports for outgoing connections, where any
    connection may hold one. A hash spreads them: formulas such as "job id modulo" collide.
    """
    ephemeral_low, ephemeral_high = _ephemeral_range()
    for attempt in range(_TRIES):
        digest = hashlib.blake2b(f"{key}/{attempt}".encode(), digest_size=4).digest()
        port = _LOWEST + int.from_bytes(digest, "big") % (_HIGHEST - _LOWEST)
        if not ephemeral_low <= port <= ephemeral_high:
            yield port


def to_listen_on(host: str) -> str:
    """Return this machine's address for `host`, to listen on that address only.

    It is empty, which means all interfaces, if `host` is not an address of this machine: another
    host forwards it. It is also empty for a name that is a loopback address here: Debian gives
    every machine the address 127.0.1.1, others do not.
    """
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, address in sorted(socket.getaddrinfo(host, None, type=_STREAM)):
            is_name = host not in ("localhost", address[0])
            if is_name and ipaddress.ip_address(address[0]).is_loopback:
                continue
            with contextlib.suppress(OSError), socket.socket(family, _STREAM) as probe:
                probe.bind((address[0], 0))
                return str(address[0])
    return ""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host:port`. Raise `OSError` if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)  # every rank of a large job connects at once
    except OSError:
        sock.close()
        raise
    return sock


def listen_on_candidate(host: str, key: str) -> socket.socket:
    """Listen on the first free candidate port of a key. The socket is kept open to hold the port.

    Raises:
        LaunchError: no candidate is free.
    """
    for port in candidates(key):
        try:
            return listen(host, port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise LaunchError(
                    f"cannot listen on {host}: {error.strerror}", code="launch.port-not-opened"
                ) from error
    raise LaunchError(
        f"no free port on {host} among {_TRIES} tried in {_LOWEST}-{_HIGHEST}",
        code="launch.no-free-port",
    )


def free_candidate(host: str, key: str) -> int:
    """Return the first candidate port of a key on which no process listens.

    Raise `LaunchError` if there is none. The port is not reserved: the process that opens it later
    may find it taken, and must report that.
    """
    with listen_on_candidate(host, key) as listener:
        return int(listener.getsockname()[1])


def parse_address(text: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of `10.0.0.5:6379` or `[::1]:6379`.

    Raises:
        ValueError: it is not `HOST:PORT`.
    """
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536
    if not host or "://" in text or not is_port:
        raise ValueError(f"{quoted(text)} is not HOST:PORT")
    return host.strip("[]"), int(port)


def is_listening(address: str, timeout_s: float = 2.0) -> bool:
    """Return whether a process listens at `HOST:PORT`."""
    try:
        socket.create_connection(parse_address(address), timeout_s).close()
    except (OSError, ValueError):
        return False
    return True


def address_towards(host: str, port: int) -> str:
    """Return this machine's address on the interface that routes to `host`."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.connect(address)  # a datagram socket: nothing is sent, only the route is chosen
        return str(sock.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with this address, for GLOO_SOCKET_IFNAME."""
    import psutil

    if address.startswith("127."):
        return "lo"
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return str(name)
    return None


def _ephemeral_range() -> tuple[int, int]:
    try:
        low, high = (
            Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()
        )
    except OSError:
        return 32768, 60999
    return int(low), int(high)
