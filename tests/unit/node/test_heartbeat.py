"""How long somebody was silent, as far as we could look."""

from __future__ import annotations

import pytest

from dtrain.node import heartbeat
from dtrain.node.heartbeat import Peer, Silence


class Clock:
    """Moved by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(heartbeat, "time", made)
    return made


def test_silence_grows_and_a_sign_ends_it(clock: Clock) -> None:
    silence = Silence(pause_s=1.0)
    silence.unchanged_s("1")
    clock.now += 1.5
    assert silence.unchanged_s("1") == 1.5
    clock.now += 1.0
    assert silence.unchanged_s("2") == 0.0


def test_time_in_which_we_could_not_look_ourselves_does_not_count(clock: Clock) -> None:
    """A job that Slurm suspends for an hour, all its processes at once, goes on."""
    silence = Silence(pause_s=1.0)
    silence.unchanged_s("1")
    clock.now += 3600.0
    assert silence.unchanged_s("1") == 2.0
    clock.now += 0.1
    assert silence.unchanged_s("2") == 0.0


def test_a_peer_is_missed_only_once_it_was_heard(clock: Clock) -> None:
    peer = Peer(lost_after_s=6.0)
    for _ in range(100):  # a fork server imports for as long as it takes
        clock.now += 1.0
        assert not peer.is_silent()
    peer.hear()
    silent = []
    for _ in range(8):
        silent.append(peer.is_silent())
        clock.now += 1.0
    assert silent == [False] * 7 + [True]
    peer.hear()
    assert not peer.is_silent()
