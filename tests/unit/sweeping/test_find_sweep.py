"""Which names mean a sweep, which one of its runs, and which neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.launchers import prepare
from dtrain.planning import Request, plan_run
from dtrain.sweeping import making
from dtrain.sweeping.sweep import find_runs, find_sweep
from dtrain.sweeping.values import choices
from support import JOBS
from support.errors import raises

TINY = str(JOBS / "tiny" / "job.yaml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sweep `ab-x` of 12 runs, of which number 1 is gone, sweep `abc` of one, and run `ab`."""
    folder = str(tmp_path_factory.mktemp("runs"))
    for name, values in (("ab-x", "seed=0..11"), ("abc", "seed=7")):
        request = Request(runs=folder, run_id=name)
        making.write(making.plan(TINY, choices([values], None, None), request), detach=False)
    alone = plan_run(TINY, Request(runs=folder, run_id="ab"))
    prepare.prepare(alone.plan, alone.job.spec, alone.job.text)
    (Path(folder) / "ab-x-1").rename(Path(folder).with_name("gone"))
    return folder


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ab-x", "ab-x"),
        ("ab-", "ab-x"),
        ("abc", "abc"),
        ("abc-0", None),
        ("ab", None),  # a run
        ("a", None),  # several
        ("ab-x-0", None),
        ("ab-x-1", None),  # gone, and not the sweep of ab-x-10
        ("last", None),
        ("", None),
        ("nothing", None),
    ],
)
def test_which_names_mean_a_sweep(runs: str, name: str, found: str | None) -> None:
    sweep = find_sweep(name, runs)
    assert (None if sweep is None else sweep.id) == found


def test_what_is_known_of_a_sweep(runs: str) -> None:
    sweep = find_sweep("ab-x", runs)
    assert sweep is not None
    assert [run.id for run in sweep.runs] == [f"ab-x-{n}" for n in range(12) if n != 1]
    assert sweep.missing == [1]
    assert sweep.fields == ["seed"]
    assert [element.values["seed"] for element in sweep.elements][:3] == [0, 2, 3]


def test_the_runs_of_several_names(runs: str) -> None:
    assert [run.id for run in find_runs(["abc", "ab", "abc-0"], runs)] == ["abc-0", "ab"]
    with raises("run.not-found", "nothing"):
        find_runs(["abc", "nothing"], runs)
    with raises("run.ambiguous", "ab-x-1"):
        find_runs(["ab-x-1"], runs)
