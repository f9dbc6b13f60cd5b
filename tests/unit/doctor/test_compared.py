"""What the head makes of the reports of all nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.doctor.compared import Merged, NodeReport, Reached, merge
from dtrain.doctor.diagnosis import Diagnosis, Status

SAME = {"Python": "3.11.7", "torch": "2.10.0", "code of the job": "a1"}
NAMES = {0: "gpu-a", 1: "gpu-b", 2: "gpu-c"}
FINE = Reached(shares_directory=True)


def report(rank: int, *found: Diagnosis, **versions: str) -> NodeReport:
    return NodeReport(NAMES[rank], NAMES[rank], list(found), {**SAME, **versions})


def merged(*reports: NodeReport, reached: dict[int, Reached] | None = None) -> dict[str, Merged]:
    given = dict(enumerate(reports or map(report, NAMES)))
    others = {rank: FINE for rank in given if rank} | (reached or {})
    return {each.diagnosis.check: each for each in merge(given, others, NAMES)}


def test_a_fact_of_all_nodes_is_written_once() -> None:
    lines = merged(*(report(rank, Diagnosis("shm", "ok", "24 GB")) for rank in NAMES))
    assert lines["shm"].diagnosis == Diagnosis("shm", "ok", "24 GB; on all nodes")
    assert not lines["shm"].nodes
    assert {each.diagnosis.status for each in lines.values()} == {"ok"}
    assert [*lines] == ["shm", "shared", "ports", "clock"]  # as the table has them


def test_the_node_with_a_problem_is_named() -> None:
    ok, bad = Diagnosis("shm", "ok", "24 GB"), Diagnosis("shm", "problem", "64 MB", "mount")
    lines = merged(report(0, ok), report(1, bad), report(2, ok))
    assert lines["shm"].diagnosis == Diagnosis("shm", "problem", "gpu-b: 64 MB", "mount")
    assert lines["shm"].nodes == {1: bad}
    both = merged(report(0, ok), report(1, bad), report(2, bad))
    assert both["shm"].diagnosis.fact == "gpu-b, gpu-c: 64 MB"


@pytest.mark.parametrize(
    ("name", "version", "check", "status"),
    [
        ("torch", "2.9.1", "versions", "problem"),
        ("Python", "3.12.1", "versions", "problem"),
        ("Python", "3.11.9", "versions", "warning"),
        ("code of the job", "b2", "code", "problem"),
    ],
)
def test_what_all_nodes_must_have(name: str, version: str, check: str, status: Status) -> None:
    lines = merged(report(0), report(1), report(2, **{name: version}))
    found = lines[check].diagnosis
    assert found.status == status
    assert found.fact.startswith(f"gpu-c: {name} {version}, and ")
    assert [*lines[check].nodes] == [2]


@pytest.mark.parametrize(
    ("ahead_s", "within_s", "status"),
    [
        (0.3, 0.0, "ok"),
        (-1.4, 0.0, "warning"),
        (1.4, 0.5, "ok"),  # the measurement is no better
        (-90.0, 0.1, "problem"),
    ],
)
def test_clocks(ahead_s: float, within_s: float, status: Status) -> None:
    lines = merged(reached={1: replace(FINE, ahead_s=ahead_s, within_s=within_s)})
    assert lines["clock"].diagnosis.status == status
    assert (1 in lines["clock"].nodes) == (status != "ok")


def test_a_node_that_cannot_be_reached_or_sees_another_disk() -> None:
    lines = merged(reached={2: Reached(error="timed out", shares_directory=False)})
    assert lines["ports"].nodes[2].status == "problem"
    assert lines["shared"].nodes[2].status == "problem"
    assert 2 not in lines["clock"].nodes


def test_a_run_at_a_url_needs_no_shared_directory() -> None:
    lines = merged(reached={rank: Reached() for rank in (1, 2)})
    assert "shared" not in lines


def test_a_node_that_does_not_answer() -> None:
    lines = merged(report(0), report(1))
    assert [*lines["answer"].nodes] == [2]
    assert lines["answer"].diagnosis.status == "problem"


def test_a_name_that_the_head_does_not_know() -> None:
    unknown = Diagnosis("names", "warning", "gpu-a cannot resolve gpu-b", "hosts")
    lines = merged(
        *(report(rank, Diagnosis("names", "ok", "known")) for rank in NAMES),
        reached={1: replace(FINE, name=unknown)},
    )
    assert lines["names"].nodes == {1: unknown}


def test_nodes_with_the_same_name_are_told_apart_by_rank() -> None:
    given = {rank: report(rank, Diagnosis("disk", "ok", str(rank))) for rank in NAMES}
    (line,) = (
        each
        for each in merge(given, {}, dict.fromkeys(NAMES, "host"))
        if each.diagnosis.check == "disk"
    )
    assert line.diagnosis.fact.splitlines() == ["node 0: 0", "node 1: 1", "and 1 more"]
