"""Ports and interfaces."""

from __future__ import annotations

import itertools

import pytest

from dtrain import ports
from dtrain.ranks import RankInfo, scrubbed
from support.errors import raises
from support.launch import network_address


def test_candidates_are_the_same_everywhere_and_spread() -> None:
    assert list(ports.candidates("run/0")) == list(ports.candidates("run/0"))
    first = {next(ports.candidates(f"run-{k}/0")) for k in range(200)}
    assert len(first) > 180
    assert all(15000 <= port < 32767 for port in first)


def test_candidates_keep_out_of_the_ephemeral_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_ephemeral_range", lambda: (16000, 60999))
    assert all(port < 16000 for port in ports.candidates("x"))


def test_a_busy_port_is_passed_over() -> None:
    with ports.listen_on_candidate("127.0.0.1", "busy") as first:
        assert first.getsockname()[1] == next(ports.candidates("busy"))
        with ports.listen_on_candidate("127.0.0.1", "busy") as second:
            assert second.getsockname()[1] == next(
                itertools.islice(ports.candidates("busy"), 1, None)
            )


def test_no_port_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with ports.listen("127.0.0.1", 0) as taken:
        monkeypatch.setattr(ports, "candidates", lambda _: iter([taken.getsockname()[1]]))
        with raises("launch.no-free-port", "127.0.0.1"):
            ports.listen_on_candidate("127.0.0.1", "x")


def test_loopback_leads_to_loopback() -> None:
    assert ports.address_towards("127.0.0.1", 1) == "127.0.0.1"
    assert ports.interface_of("127.0.0.1") == "lo"
    assert ports.interface_of("203.0.113.7") is None


def test_rank_info_reads_torchrun_variables() -> None:
    env = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "TORCHELASTIC_RESTART_COUNT": "2",
    }
    assert RankInfo.from_env(env) == RankInfo(5, 8, 1, 4, 1, 2)
    assert RankInfo.from_env({}) == RankInfo()
    assert RankInfo.from_env({}).is_rank_zero
    assert RankInfo.from_env({"NODE_RANK": "3"}).node_rank == 3


def test_another_launchers_variables_are_scrubbed() -> None:
    env = {"RANK": "1", "MASTER_ADDR": "x", "SLURM_JOB_ID": "7", "PET_NNODES": "2", "PATH": "/bin"}
    assert scrubbed(env) == {"PATH": "/bin"}


def test_a_listener_is_on_the_address_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = network_address()
    assert [ports.to_listen_on(host) for host in ("127.0.0.1", "127.0.0.9", own)] == [
        "127.0.0.1", "127.0.0.9", own,
    ]  # fmt: skip
    assert ports.to_listen_on("localhost") in ("127.0.0.1", "::1")
    elsewhere = ("192.0.2.77", "2001:db8::1", "no such name", "")
    assert [ports.to_listen_on(host) for host in elsewhere] == [""] * 4
    names = {"gpu-a": [own], "debian": ["127.0.1.1"], "several": ["192.0.2.77", own]}
    monkeypatch.setattr(
        "socket.getaddrinfo",
        lambda host, *_, **__: [(2, 1, 6, "", (address, 0)) for address in names[host]],
    )
    assert [ports.to_listen_on(name) for name in names] == [own, "", own]
