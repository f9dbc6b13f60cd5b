"""The last collectives of a rank, and where the ranks part."""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.run.flight_recorder import SLOTS, Divergence, Ring, first_divergence, read_ring


def test_what_a_killed_process_wrote_is_there(tmp_path: Path) -> None:
    ring = Ring()
    pid = os.fork()
    if pid == 0:
        for number in range(1, SLOTS + 11):
            ring.write(number, f"call {number} " + "x" * 300)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    file = tmp_path / "ring"
    file.write_bytes(ring.contents())
    calls = read_ring(file)
    assert list(calls) == list(range(11, SLOTS + 11))
    assert calls[11].startswith("call 11 xxx")


def test_no_file_and_a_cut_file_say_nothing(tmp_path: Path) -> None:
    assert read_ring(tmp_path / "none") == {}
    (tmp_path / "cut").write_bytes(b"x" * 10)
    assert read_ring(tmp_path / "cut") == {}


def test_where_ranks_part() -> None:
    same = {1: "a", 2: "b", 3: "c"}
    assert first_divergence({}) is None
    assert first_divergence({0: same, 1: {2: "b"}, 2: {}}) is None
    odd = {1: "a", 2: "c", 3: "d"}
    assert first_divergence({0: same, 1: odd, 2: same}) == Divergence(2, 1, True, "c", "b", 0)
    assert first_divergence({0: odd, 1: same, 2: same}) == Divergence(2, 0, True, "c", "b", 1)
    assert first_divergence({0: same, 1: odd}) == Divergence(2, 1, False, "c", "b", 0)
