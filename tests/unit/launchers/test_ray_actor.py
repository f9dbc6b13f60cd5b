"""The actor of a node, without Ray: how its process ends, and what it says of the node."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dtrain.launchers.ray.actor import NodeActor

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
ENDS = [sys.executable, "-c", "import sys; sys.exit(int(sys.argv[1] == '--parent') * 7)"]


def test_a_node_that_hears_nothing_ends_its_workers(tmp_path: Path) -> None:
    actor = NodeActor()
    actor.start(SLEEP, str(tmp_path), str(tmp_path / "log"), lost_after_s=0.5)
    assert actor.beat(30) == (137, [])  # one beat, and then silence


def test_beats_keep_it_alive_and_bring_the_exit_code(tmp_path: Path) -> None:
    actor = NodeActor()
    actor.start(SLEEP, str(tmp_path), str(tmp_path / "log"), lost_after_s=2)
    assert [actor.beat(0.3) for _ in range(10)] == [(None, [])] * 10
    actor.signal(15)
    assert actor.beat(30) == (143, [])
    ended = NodeActor()
    ended.start(ENDS, str(tmp_path), str(tmp_path / "log"), lost_after_s=60)
    assert ended.beat(30) == (7, [])


def test_what_a_node_lacks(tmp_path: Path) -> None:
    probe = tmp_path / "run" / "ray" / "probe"
    probe.mkdir(parents=True)
    (probe / "driver").touch()
    wish = {"python": None, "packages": ["dtrain.node", "no_such.part"], "probe": str(probe)}
    look = NodeActor().look(wish)
    assert look["versions"]["no_such"] is None
    assert look["versions"]["dtrain"]
    assert look["sees_run"] in os.listdir(probe)
    blind = NodeActor().look({**wish, "python": "/no/python", "probe": "/no/run/ray/probe"})
    assert blind["sees_run"] == ""
    assert "/no/python cannot be run" in blind["trouble"]
