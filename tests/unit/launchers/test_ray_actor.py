"""The actor of a node, without Ray: how its process ends, and what it reports about the node."""

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
    assert actor.heartbeat(30) == (137, [])  # one beat, and then silence


def test_beats_keep_it_alive_and_bring_the_exit_code(tmp_path: Path) -> None:
    actor = NodeActor()
    actor.start(SLEEP, str(tmp_path), str(tmp_path / "log"), lost_after_s=2)
    assert [actor.heartbeat(0.3) for _ in range(10)] == [(None, [])] * 10
    actor.signal(15)
    assert actor.heartbeat(30) == (143, [])
    ended = NodeActor()
    ended.start(ENDS, str(tmp_path), str(tmp_path / "log"), lost_after_s=60)
    assert ended.heartbeat(30) == (7, [])


def test_what_a_node_lacks(tmp_path: Path) -> None:
    probe = tmp_path / "run" / "ray" / "probe"
    probe.mkdir(parents=True)
    (probe / "driver").touch()
    request = {"python": None, "packages": ["dtrain.node", "no_such.part"], "probe": str(probe)}
    report = NodeActor().inspect(request)
    assert report["versions"]["no_such"] is None
    assert report["versions"]["dtrain"]
    assert report["probe_file"] in os.listdir(probe)
    lacking = NodeActor().inspect({**request, "python": "/no/python", "probe": "/no/run/ray/probe"})
    assert lacking["probe_file"] == ""
    assert "/no/python cannot be run" in lacking["error"]
