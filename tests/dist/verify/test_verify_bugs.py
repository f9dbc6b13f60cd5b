"""A catalogue of seeded bugs: `verify` flags each with the right class and names its cause.

Each is a module in tests/jobs/bugs that changes one line of how a training is done. What people
write into a task is in test_verify_tasks.py, what only a launcher brings in test_verify_launch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dtrain.verification.compare import L1, compare
from dtrain.verification.judge import Judge
from dtrain.verification.layouts import REFERENCE, Layout
from dtrain.verification.rules import DATA
from support import JOBS
from support.mistakes import BUGS, DDP, FP16, RESUMED, UNWEIGHTED, Bug
from support.warm_runner import WarmRunner, of_one

FOLDER = JOBS / "bugs"


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(settings of the job) → its judge; the reference is run once for all bugs."""
    made: dict[tuple[str, ...], Judge] = {}

    def judge(overrides: tuple[str, ...]) -> Judge:
        if overrides not in made:
            runner = WarmRunner(
                FOLDER / "job.yaml",
                overrides=overrides,
                max_train_samples=29,  # 12, 12 and 5 a step: the fourth begins a new epoch
                max_eval_samples=17,
                keep=tmp_path_factory.mktemp("runs"),
            )
            made[overrides] = Judge(runner)
        return made[overrides]

    return judge


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_a_bug_is_flagged_and_its_cause_named(judges: Any, bug: Bug) -> None:
    preload = (f"launch.preload=[{bug.module}]",) if bug.module else ()
    result = of_one(judges(bug.job), replace(bug.layout, overrides=preload, title=bug.id))
    assert result.verdict == "different", result
    assert result.finding is not None
    found = result.finding
    assert (found.rule, found.step, result.level) == (bug.rule, bug.step, bug.level), found
    assert bug.likely in found.likely_cause, found


def test_a_run_that_stops_itself_is_explained_all_the_same(judges: Any) -> None:
    judge = judges(("data.exactly_once=true",))
    result = of_one(judge, replace(DDP, overrides=("launch.preload=[padded]",), title="padded"))
    assert result.verdict == "different", result
    assert result.finding is not None
    assert (result.finding.rule, result.finding.step) == (DATA, 3)
    assert "samples" in result.failure


@pytest.mark.parametrize(
    "layout",
    [
        Layout("dp", procs=3),
        Layout("ddp", procs=3),
        Layout("fsdp", procs=2),
        Layout("exact", procs=2),
        replace(DDP, micro_batch_size=2),
    ],
    ids=lambda layout: layout.name,
)
def test_every_strategy_agrees_in_fp64(judges: Any, layout: Layout) -> None:
    judge = judges(())
    options = replace(judge.runner.trace_options, fp64=True)
    comparison = compare(
        judge.runner.record(REFERENCE, options), judge.runner.record(layout, options)
    )
    assert comparison.excess(L1) is None, comparison.excess(L1)
    assert comparison.largest.value < 1e-13


def test_a_job_with_an_order_of_its_own_keeps_all_samples(judges: Any) -> None:
    judge = judges(("args.ordered=true",))
    assert judge.reference.steps[1].facts["num_samples"] == 60
    assert judge.reference.ids(1) == list(range(59, 47, -1))
    assert of_one(judge, DDP).passed


CLEAN = [
    Layout("dp", procs=2),
    DDP,
    Layout("ddp", procs=4),
    replace(DDP, micro_batch_size=2, workers=2),
    RESUMED,
    replace(DDP, overrides=("launch.preload=[handmade]",), title="by hand"),
]


@pytest.mark.parametrize("layout", CLEAN, ids=lambda layout: layout.name)
@pytest.mark.parametrize("job", [(), UNWEIGHTED], ids=["weighted", "means"])
def test_the_same_job_without_a_bug_passes(
    judges: Any, layout: Layout, job: tuple[str, ...]
) -> None:
    result = of_one(judges(job), layout)
    assert result.verdict in ("same", "rounding"), result
    assert result.level in ("L1", "L2", "L3")
    assert result.finding is None


def test_dropout_is_no_bug_but_said(judges: Any) -> None:
    result = of_one(judges(("args.dropout=0.3",)), DDP)
    assert (result.verdict, result.fixed_noise) == ("same", True), result
    assert result.level in ("L1", "L2")


def test_fp16_is_rounding_and_fp64_shows_it(judges: Any) -> None:
    result = of_one(judges(FP16), DDP)
    assert (result.verdict, result.level) == ("rounding", "L1"), result
    assert result.shrinks is not None
    assert result.shrinks > 1e8
