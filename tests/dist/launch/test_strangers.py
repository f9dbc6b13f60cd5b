"""Who knows host and port of a launch, and no more, can neither join it, nor end it, nor write.

And what listens where, as docs/security.md says it.
"""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistError, TCPStore

from dtrain import ports
from dtrain.node.rendezvous import Member
from dtrain.node.sealed import Remote
from dtrain.run.failures import FailureRecord
from dtrain.run.rundir import RunDir
from support.launch import (
    TINY,
    descendants,
    listeners,
    metrics,
    network_address,
    started,
    the_run,
    until,
    wait_for_step,
)

Place = tuple[str, int]
STEPS = ("--set", "train.steps=80", "--set", "args.pause=0.05")


def intrude(place: Place, outside: Path) -> None:
    """Try to be node 1, to end the launch with a record that is written elsewhere, and junk."""
    record = asdict(FailureRecord("exit", "planted", 77, 1, "gpu-b", rank=1))
    record["node_rank"], record["rank"] = f"../../../../{outside.name}/x", None
    closed = json.dumps({"reason": "a stranger", "record": record, "signal": None})
    member = json.dumps(asdict(Member(1, "a stranger", "127.0.0.1")))
    for kind, text in ((_own_store, closed), (_own_store, "no JSON"), (_torchs_store, closed)):
        with contextlib.suppress(DistError, OSError):
            store = kind(place)
            store.add("0/here/1", 1)
            store.set("0/node/1", member)
            store.add("0/count", 1)
            store.set("closed", text)
    with socket.create_connection(place, 10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))


def _own_store(place: Place) -> Any:
    return Remote(place, bytes(32), socket.create_connection(place, 10))


def _torchs_store(place: Place) -> Any:
    return TCPStore(*place, is_master=False, timeout=timedelta(seconds=0.3))


def assert_refused(run: RunDir, outside: Path) -> None:
    assert list(outside.iterdir()) == []
    assert not list(run.failures(0).glob("*"))
    assert metrics(run)[-1]["step"] == 80
    said = run.agent_log(0, 0).read_text()
    assert said.count("refused a connection from ") == 1
    assert "Traceback" not in said


def test_a_launch_that_trains_trains_on(tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    with started("launch", "--nodes", "2", *STEPS, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 1)
        intrude(("127.0.0.1", json.loads(run.plan.read_text())["rdzv_port"]), outside)
        assert listeners(descendants(process.pid)) == {"127.0.0.1"}
        assert metrics(run)[-1]["step"] < 80, "it had ended before"
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert_refused(run, outside)


@pytest.mark.parametrize("host", [network_address(), "localhost"])
def test_a_node_that_waits_waits_for_its_own(tmp_path: Path, host: str) -> None:
    (outside := tmp_path / "outside").mkdir()
    address = ports.to_listen_on(host)
    place = (address, ports.free_candidate(address, str(tmp_path)))

    def node(rank: int) -> contextlib.AbstractContextManager[Any]:
        return started(
            "launch", "--launcher", "torchrun", "--nodes", "2", "--run-id", "wait",
            "--node-rank", str(rank), "--rdzv-endpoint", f"{host}:{place[1]}", *STEPS, TINY,
            cwd=tmp_path,
        )  # fmt: skip

    with node(0) as head:
        until("the first node's plan", (tmp_path / "runs/wait/resolved.yaml").exists)
        run = the_run(tmp_path)
        until("its rendezvous", lambda: _listens(place))
        intrude(place, outside)
        with node(1) as other:
            wait_for_step(tmp_path, 1)
            assert [listeners(descendants(each.pid)) for each in (head, other)] == [{address}] * 2
            outputs = [process.communicate(timeout=60)[0] for process in (head, other)]
            assert [head.returncode, other.returncode] == [0, 0], outputs
    assert_refused(run, outside)


def _listens(place: Place) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(place, 5):
        return True
    return False
