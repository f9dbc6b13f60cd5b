"""`dtrain bench` on nodes that are simulated: what it measures, of nodes and of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import EXAMPLES
from support.launch import DIGITS, TINY, dtrain

TWO = ("--nodes", "2", "--procs", "1")


def measured(cwd: Path, *arguments: str | Path) -> dict[str, Any]:
    done = dtrain("bench", *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nodes(tmp_path: Path) -> None:
    found = measured(tmp_path, *TWO)
    nodes = found["measured"]
    assert (nodes["nodes"], nodes["ranks"], nodes["device"]) == (["node-0", "node-1"], 2, "cpu")
    times = {(each["operation"], each["bytes"]): each["seconds"] for each in nodes["collectives"]}
    assert {name for name, _ in times} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "broadcast",
    }
    assert len(times) == 16
    for operation in ("all_reduce", "broadcast"):
        assert 0 < times[operation, 1 << 10] < times[operation, 1 << 24]
    assert [(each["source"], each["target"]) for each in nodes["links"]] == [(0, 1), (1, 0)]
    assert all(1e-6 < each["latency_s"] < 0.1 < each["bytes_per_s"] for each in nodes["links"])
    assert 1e-7 < nodes["store"]["set_s"] < 0.1
    assert (found["step"], nodes["loader"]) == (None, [])
    assert found["advice"] == [], "two links, and nothing of a job"


def test_a_job(tmp_path: Path) -> None:
    found = measured(tmp_path, *TWO, "--only", "loader,step", "--steps", "30", DIGITS)
    loader = {each["workers"]: each["samples_per_s"] for each in found["measured"]["loader"]}
    assert {0, 1} <= loader.keys()
    assert all(rate > 0 for rate in loader.values())
    assert found["measured"]["collectives"] == []
    assert 0 < found["step"]["steps"] <= 30
    assert sum(found["step"]["shares"].values()) > 0.99
    assert len(found["runs"]) == 2


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    script = EXAMPLES / "script" / "job.yaml"
    found = measured(tmp_path, "--procs", "1", "--only", "step", script)
    assert (found["runs"], list(found["problems"])) == ([], ["step"])
    refused = dtrain("bench", "--only", "lins", cwd=tmp_path)
    assert refused.returncode == 2
    assert "[usage.invalid-value]" in refused.stderr
    broken = ("--set", "args.misbehave=raise", "--set", "args.at=2", "--set", "args.rank=0")
    failed = dtrain("bench", "--only", "step", *broken, TINY, cwd=tmp_path)
    assert failed.returncode == 1
    assert "[bench.failed]" in failed.stderr
    assert "rank 0" in failed.stderr
    assert "Traceback" not in failed.stderr
