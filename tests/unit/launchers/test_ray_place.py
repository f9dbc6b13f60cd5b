"""What fits on which node of a Ray cluster, in words; a job's output; options."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain import planning
from dtrain.cli.main import main
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.profile import checked_options, load_profile, parse_options
from dtrain.launchers.ray import driver, job_output, placement
from dtrain.launchers.ray.options import RayOptions
from dtrain.launchers.ray.placement import Decision, Refuse, ResourceRequest, Take, Wait
from dtrain.run.rundir import RunDir
from support import JOBS
from support.errors import assert_shown, raises

TINY = JOBS / "tiny" / "job.yaml"


def node(number: int, *, alive: bool = True, host: str = "vm", **total: float) -> dict[str, object]:
    return {
        "Alive": alive,
        "NodeID": f"id{number}",
        "NodeName": f"10.0.0.{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
        "NodeManagerHostname": host,
        "NodeManagerPort": 1,
        "Resources": total,
        "Labels": {"zone": "a"},
    }


def test_nodes_are_in_the_order_of_their_addresses_and_named_by_host_where_that_tells() -> None:
    nodes = [node(10, host="x"), node(9), node(2), node(3, alive=False)]
    assert [view.name for view in placement.views(nodes, {})] == ["10.0.0.2", "10.0.0.9", "x"]


def test_a_shortage_is_reported_by_node() -> None:
    nodes = [node(1, CPU=8, GPU=4), node(2, CPU=2)]
    views = placement.views(nodes, {"id1": {"CPU": 8, "GPU": 1}, "id2": {"CPU": 2}})
    request = ResourceRequest(1, 2, {"CPU": 4, "GPU": 2}, {})
    assert placement.shortage(request, views).splitlines() == [
        "requested: 1 to 2 nodes with 4 CPU, 2 GPU each; 0 of the cluster's 2 nodes fit",
        "  10.0.0.1 (10.0.0.1): free 8 of 8 CPU, 1 of 4 GPU; 1 GPU missing",
        "  10.0.0.2 (10.0.0.2): free 2 of 2 CPU; 2 CPU missing; 2 GPU missing",
    ]
    wrong_zone = ResourceRequest(1, 1, {"CPU": 1}, {"zone": "b"})
    assert "label zone is a" in placement.shortage(wrong_zone, views)


FREE, BUSY = {"CPU": 4}, {"CPU": 0}


@pytest.mark.parametrize(
    ("free", "waited", "grows", "may_come_back", "decided"),
    [
        ([FREE, FREE, FREE], 0, False, False, Take(3)),
        ([FREE, FREE, FREE, FREE], 0, False, False, Take(3)),  # no more than asked
        ([FREE, FREE, BUSY], 0, False, False, Wait()),  # a third may become free in a moment
        ([FREE, FREE, BUSY], 4, False, False, Take(2)),
        ([FREE, BUSY, BUSY], 4, False, False, Wait()),
        ([FREE, BUSY, BUSY], 4, True, False, Take(2, are_available=False)),
        ([FREE], 0, True, False, Take(2, are_available=False)),
        ([FREE], 0, False, True, Wait()),
        ([FREE], 0, False, False, Refuse("cannot be placed: ")),
        ([FREE, BUSY], 11, False, True, Refuse("not placed within 10 s (place_timeout): ")),
    ],
)
def test_what_is_done_about_a_request(
    free: list[dict[str, float]], waited: float, grows: bool, may_come_back: bool, decided: Decision
) -> None:
    views = placement.views(
        [node(k, CPU=4) for k in range(len(free))], {f"id{k}": each for k, each in enumerate(free)}
    )
    request = ResourceRequest(2, 3, {"CPU": 4}, {})
    found = placement.decide(request, views, waited, 10, grows=grows, may_come_back=may_come_back)
    if isinstance(decided, Refuse):
        decided = Refuse(decided.why + placement.shortage(request, views))
    assert found == decided


@pytest.mark.parametrize(
    ("worst", "lost", "stops", "left", "code"),
    [
        (0, {}, 0, 3, 0),
        (143, {}, 0, 3, 143),  # the workers' own failure: no other attempt
        (1, {1: "cut"}, 0, 3, None),
        (1, {1: "cut"}, 0, 0, 1),
        (1, {1: "cut"}, 1, 3, 143),
        (0, {}, 1, 3, 0),
    ],
)
def test_what_follows_an_attempt(
    worst: int, lost: dict[int, str], stops: int, left: int, code: int | None
) -> None:
    outcome: Any = SimpleNamespace(lost=lost, code=worst)
    assert driver.decide(outcome, stops, left) == code


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        ({"adress": "x:1"}, "option.unknown-field", "adress"),
        ({"submit": "job"}, "option.invalid-value", "submit: job"),
        ({"cluster_runs": "/shared"}, "option.invalid-value", "--runs"),
        ({"relaunch": -1}, "option.out-of-range", "relaunch"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, object], code: str, names: str) -> None:
    with raises(code, names):
        RayOptions.of(AnyOptions(**options))


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        (("submit=job",), "option.conflict", ["--launcher ray: ", "submit: job", "address"]),
        (("cluster_runs=s3://b/runs",), "option.conflict", ["cluster_runs", "submit: job"]),
        (("address=head",), "option.conflict", ["'head'", "HOST:PORT"]),
        (("address=http://head:8265",), "option.conflict", ["'http://head:8265'", "submit: job"]),
        (("address=ray://head:10001",), "option.conflict", ["'ray://head:10001'", "HOST:PORT"]),
        (("address=':6379'",), "option.conflict", ["':6379'", "HOST:PORT"]),
        (
            ("adress=x:1", "relaunch=-1"),
            "option.unknown-field",
            ["-o adress: ", "'address'", "-o relaunch: ", "  [option.out-of-range]"],
        ),
    ],
)
def test_the_command_reports_such_options(
    flags: tuple[str, ...], code: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "plan",
                "--launcher",
                "ray",
                *(part for flag in flags for part in ("-o", flag)),
                str(TINY),
            ]
        )
    assert ended.value.code == 2
    assert_shown(capsys.readouterr().err, code, *names)


def test_a_mapping_that_a_flag_sets_is_known_as_the_flags() -> None:
    """Otherwise the next attempt would run without it."""
    profile = load_profile("ray", TINY.parent)
    given = parse_options(["resources={gear: 1}"], RayOptions)
    _, sources = checked_options(profile, given, RayOptions)
    assert sources["resources"] == "-o resources"


def test_options_of_the_launcher_that_a_flag_set_are_kept_at_a_resume() -> None:
    given = parse_options(["resources.gear=1", "relaunch=5"], RayOptions)
    before: Any = SimpleNamespace(
        options=AnyOptions(resources={"gear": 1, "disk": 2}, relaunch=5, memory=5),
        sources={
            "resources": "-o resources.gear",
            "resources.gear": "-o resources.gear",
            "resources.disk": "launchers/site.yaml:5:5",
            "relaunch": "-o relaunch",
            "memory": "launchers/site.yaml:4:11",
        },
    )
    found = planning._options_before(before)
    assert {name: part.plain() for name, part in found.items()} == {
        "resources": {"gear": 1},
        "relaunch": 5,
    }
    assert found["relaunch"].place == given["relaunch"].place


def test_a_run_is_mirrored_line_by_line_and_twice_is_as_good_as_once(tmp_path: Path) -> None:
    there, here = RunDir(tmp_path / "there"), RunDir(tmp_path / "here")
    there.create()
    here.create()
    log = there.rank_log(0, 0, 0)
    log.parent.mkdir(parents=True)
    out = io.StringIO()
    for text in ("one\nzw\xf6", "lf\n"):
        with job_output.printing(there, out):
            with log.open("a", encoding="utf-8") as file:
                file.write(text)
            there.events.write_text(text)
    for _ in range(2):
        job_output.apply(here, "of the program itself\n" + out.getvalue())
        assert here.rank_log(0, 0, 0).read_bytes() == log.read_bytes()
    outside = '@dtrain {"name": "../outside", "bytes": "x"}\n'
    job_output.apply(here, outside)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.7:6379", True), ("192.0.2.1:6379", False), ("no.such.host.invalid:1", False)],
)
def test_which_clusters_need_a_token_most(address: str, loopback: bool) -> None:
    assert driver.is_loopback(address) is loopback
