"""A catalogue of seeded bugs: `verify` flags each with the right class and names its cause.

Each is a module in tests/jobs/bugs that changes one line of how a training is done. What people
write into a task is in test_verify_tasks.py, what only a launcher brings in test_verify_launch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from dtrain.verify.clauses import (
    BATCH_NORM,
    BUFFERS,
    CLIPPING,
    DATA,
    EVALUATION,
    GRADIENT,
    LOSS,
    MODEL,
    RANDOM,
    REPLICAS,
    SCALER,
    SCHEDULE,
    START,
    UPDATE,
)
from dtrain.verify.compare import L1, compare
from dtrain.verify.judge import Judge, Result
from dtrain.verify.pairs import REFERENCE, Pair
from support import JOBS
from support.warm_lab import WarmLab

BUGS = JOBS / "bugs"


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(settings of the job) → its judge; the reference is run once for all bugs."""
    made: dict[tuple[str, ...], Judge] = {}

    def judge(overrides: tuple[str, ...]) -> Judge:
        if overrides not in made:
            lab = WarmLab(
                BUGS / "job.yaml",
                overrides=overrides,
                max_train_samples=29,  # 12, 12 and 5 a step: the fourth begins a new epoch
                max_eval_samples=17,
                keep=tmp_path_factory.mktemp("runs"),
            )
            made[overrides] = Judge(lab)
        return made[overrides]

    return judge


DDP = Pair("ddp", procs=2)


@dataclass(frozen=True)
class Bug:
    """A bug and what is to be said of it."""

    module: str
    clause: str
    likely: str
    """A part of the likely cause."""
    step: int = 1
    pair: Pair = DDP
    job: tuple[str, ...] = field(default=())
    level: str | None = "L0"

    @property
    def id(self) -> str:
        """For pytest."""
        return self.module or self.job[0].partition("=")[0].rpartition(".")[2]


RESUMED = replace(DDP, resume_after=3)
UNWEIGHTED = ("args.weighted=false",)
FP16 = ("train.precision=fp16", "train.clip_grad_norm=null", "args.scale=0.001")

CATALOGUE = [
    Bug("mean_of_means", GRADIENT, "mean of means"),
    Bug("mean_of_means", GRADIENT, "mean of means: ranks hold weights of 3, 2", 3, job=UNWEIGHTED),
    Bug("sum_not_mean", GRADIENT, "added over the 2 processes and not divided"),
    Bug("averaged_twice", GRADIENT, "divided by the 2 processes once more (wrapped twice?)"),
    Bug("wrapped_twice", MODEL, "wrapped a second time", 0),
    Bug("reduced_twice_in_part", GRADIENT, "not reduced, or reduced twice"),
    Bug("weights_ignored", GRADIENT, "number of samples instead of the weights"),
    Bug("missing_no_sync", GRADIENT, "accumulated gradients are reduced more than once",
        pair=replace(DDP, micro_batch_size=2)),
    Bug("never_reduced", REPLICAS, "gradients are not reduced"),
    Bug("clipped_before_reduction", CLIPPING, "clips its own gradient"),
    Bug("scheduler_per_rank", SCHEDULE, "once per process (2)", 2),
    Bug("rate_times_world", SCHEDULE, "multiplied by the 2 processes"),
    Bug("update_per_micro_batch", UPDATE, "2.9 times as far from the same gradient"),
    Bug("padded", DATA, "padded to equal length", 3, level=None),
    Bug("dropped", DATA, "samples that do not divide are dropped", 3, level=None),
    Bug("not_shared_out", DATA, "not shared out between the ranks", level=None),
    Bug("dealt_in_turn", DATA, "another order", level=None),
    Bug("forgotten_epoch", DATA, "set_epoch forgotten", 4, level=None),
    Bug("seed_by_rank", DATA, "each rank's own", level=None),
    Bug("wrong_resume", DATA, "wrong position", 3, pair=replace(DDP, resume_after=2), level=None),
    Bug("momentum_lost", UPDATE, "optimizer's state was not restored", 4, pair=RESUMED),
    Bug("schedule_lost", SCHEDULE, "scheduler's state was not restored", 4, pair=RESUMED),
    Bug("scale_left_in", SCALER, "65536 is never taken out",
        job=FP16),
    Bug("seeded_by_rank", START, "seeded by rank", 0),
    Bug("same_random_numbers", RANDOM, "same seed", job=("args.dropout=0.3",)),
    Bug("reads_its_rank", LOSS, "reads its rank"),
    Bug("", BATCH_NORM, "BatchNorm (norm) normalises over each process's own samples",
        job=("args.norm=true",)),
    Bug("stale_buffer", BUFFERS, "stale copy"),
    Bug("unsynced_buffers", BUFFERS, "not synchronised", job=("args.tracks=true",)),
    Bug("", BUFFERS, "from its own samples", job=("args.tracks=true",)),
    Bug("padded_evaluation", EVALUATION, "repeated or dropped", 5),
]  # fmt: skip


def of_one(judge: Judge, pair: Pair) -> Result:
    (result,) = judge.judge([pair])
    return result


@pytest.mark.parametrize("bug", CATALOGUE, ids=lambda bug: bug.id)
def test_a_bug_is_flagged_and_its_cause_named(judges: Any, bug: Bug) -> None:
    preload = (f"launch.preload=[{bug.module}]",) if bug.module else ()
    result = of_one(judges(bug.job), replace(bug.pair, overrides=preload, title=bug.id))
    assert result.verdict == "different", result
    assert result.finding is not None
    found = result.finding
    assert (found.clause, found.step, result.level) == (bug.clause, bug.step, bug.level), found
    assert bug.likely in found.likely, found


def test_a_run_that_stops_itself_is_explained_all_the_same(judges: Any) -> None:
    judge = judges(("data.exactly_once=true",))
    result = of_one(judge, replace(DDP, overrides=("launch.preload=[padded]",), title="padded"))
    assert result.verdict == "different", result
    assert result.finding is not None
    assert (result.finding.clause, result.finding.step) == (DATA, 3)
    assert "samples" in result.failure


@pytest.mark.parametrize(
    "pair",
    [
        Pair("dp", procs=3),
        Pair("ddp", procs=3),
        Pair("fsdp", procs=2),
        Pair("exact", procs=2),
        replace(DDP, micro_batch_size=2),
    ],
    ids=lambda pair: pair.name,
)
def test_every_strategy_agrees_in_fp64(judges: Any, pair: Pair) -> None:
    judge = judges(())
    wish = replace(judge.lab.wish, fp64=True)
    comparison = compare(judge.lab.record(REFERENCE, wish), judge.lab.record(pair, wish))
    assert comparison.excess(L1) is None, comparison.excess(L1)
    assert comparison.largest.value < 1e-13


def test_a_job_with_an_order_of_its_own_keeps_all_samples(judges: Any) -> None:
    judge = judges(("args.ordered=true",))
    assert judge.reference.steps[1].facts["num_samples"] == 60
    assert judge.reference.ids(1) == list(range(59, 47, -1))
    assert of_one(judge, DDP).passed


CLEAN = [
    Pair("dp", procs=2),
    DDP,
    Pair("ddp", procs=4),
    replace(DDP, micro_batch_size=2, workers=2),
    RESUMED,
    replace(DDP, overrides=("launch.preload=[handmade]",), title="by hand"),
]


@pytest.mark.parametrize("pair", CLEAN, ids=lambda pair: pair.name)
@pytest.mark.parametrize("job", [(), UNWEIGHTED], ids=["weighted", "means"])
def test_the_same_job_without_a_bug_passes(judges: Any, pair: Pair, job: tuple[str, ...]) -> None:
    result = of_one(judges(job), pair)
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
