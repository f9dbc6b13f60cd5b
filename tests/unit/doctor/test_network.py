"""Checks of the network, some of them in a network of their own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.doctor import network
from dtrain.doctor.asked import Asked
from dtrain.doctor.diagnosis import Diagnosis
from dtrain.doctor.network import Answer

ASKED = Asked(Path("runs"))


def test_names() -> None:
    known = network.resolve("localhost")
    assert (known.is_known, known.text in ("127.0.0.1", "::1")) == (True, True)
    assert network.name_of("127.0.0.1").text == "localhost"
    for name in ("no-such-host.invalid", "a" * 300):
        assert not network.resolve(name).is_known
    assert not network.name_of("not an address").is_known
    assert network.names(ASKED).check == "names"
    found = network.name_not_known("here", "there", Answer("unknown", False, 0.0))
    assert (found.status, found.remedy.count("there")) == ("warning", 1)


def test_name_servers_that_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = Answer("here", True, 0.2), Answer("here", True, 1.2)
    assert network.slow_names("here", quick, quick) is None
    found = network.slow_names("here", quick, slow)
    assert found is not None
    assert (found.status, "RES_OPTIONS" in found.remedy) == ("warning", True)
    monkeypatch.setattr(network, "_RESOLVE_S", 0.05)
    silent = network._ask(lambda: time.sleep(0.3))  # a name server that drops queries
    assert (silent.is_known, silent.seconds) == (False, 0.05)


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "=lo,none", "ok"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib7", "problem"),
        ("GLOO_SOCKET_IFNAME", "ib7", "problem"),
    ],
)
def test_an_interface_that_is_not_there(variable: str, value: str, status: str) -> None:
    found = network.interface(replace(ASKED, env={variable: value}))
    assert found.status == status
    assert (f"unset {variable}" in found.remedy) == (status == "problem")


def test_the_interface_that_leads_to_the_head() -> None:
    found = network.interface(replace(ASKED, head=("127.0.0.1", 29400), hosts=2))
    assert found.fact == "lo (127.0.0.1) leads to the head at 127.0.0.1"
    lost = network.interface(replace(ASKED, head=("no-such-host.invalid", 29400), hosts=2))
    assert (lost.status, "no-such-host.invalid" in lost.remedy) == ("problem", True)


def in_a_network_of_its_own(call: str, *, up: bool) -> Diagnosis:
    """What a check finds where there is only a loopback interface, up or down."""
    code = (
        "import json\nfrom dataclasses import asdict\nfrom pathlib import Path\n"
        "from dtrain.doctor import network\nfrom dtrain.doctor.asked import Asked\n"
        f"print(json.dumps(asdict({call})))"
    )
    first = "ip link set lo up; " if up else ""
    command = [
        "unshare",
        "--net",
        "sh",
        "-c",
        f'{first}exec "$@"',
        "sh",
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip("no right to make a network here")
    assert done.returncode == 0, done.stderr
    return Diagnosis(**json.loads(done.stdout))


def test_a_host_without_a_route() -> None:
    asked = "Asked(Path('runs'), hosts={})"
    ports, route = "network.own_ports", "network.interface"
    assert in_a_network_of_its_own(f"{route}({asked.format(1)})", up=True).status == "ok"
    assert in_a_network_of_its_own(f"{route}({asked.format(2)})", up=True).status == "warning"
    assert in_a_network_of_its_own(f"{ports}({asked.format(1)})", up=True).status == "ok"
    down = in_a_network_of_its_own(f"{ports}({asked.format(1)})", up=False)
    assert (down.check, down.status) == ("ports", "problem")


def test_why_the_head_cannot_be_reached() -> None:
    with pytest.raises(socket.gaierror) as unknown:
        socket.create_connection(("no-such-host.invalid", 1))
    assert "getent hosts no-such-host.invalid" in network.why_unreachable(
        "no-such-host.invalid", 1, unknown.value
    )
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(ConnectionRefusedError) as refused:
            socket.create_connection(("127.0.0.1", port))
    assert f"port {port}" in network.why_unreachable("127.0.0.1", port, refused.value)
    assert "ufw allow" in network.why_unreachable("10.0.0.1", 1, TimeoutError())
    assert "ip route get" in network.why_unreachable("10.0.0.1", 1, OSError())
