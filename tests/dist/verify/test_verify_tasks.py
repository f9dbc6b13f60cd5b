"""Mistakes in tasks: `verify` finds each, names its class and cause, and lets its twin pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from dtrain.verify.clauses import (
    DATA,
    EVALUATION,
    GRADIENT,
    LOSS,
    REPLICAS,
    SCHEDULE,
    START,
    STATE,
    UPDATE,
)
from dtrain.verify.judge import Judge, Result
from dtrain.verify.pairs import Pair
from support import JOBS
from support.warm_lab import WarmLab

DDP = Pair("ddp", procs=2)
DDP3 = Pair("ddp", procs=3)
MICRO = replace(DDP, micro_batch_size=2)
RESUMED = replace(DDP, resume_after=3)
EXACT = Pair("exact", procs=2)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(class, whether it makes its mistake) → its judge, with the reference run once."""
    made: dict[tuple[str, bool], Judge] = {}

    def judge(name: str, mistake: bool) -> Judge:
        if (name, mistake) not in made:
            lab = WarmLab(
                JOBS / "mistakes" / "job.yaml",
                overrides=(f"task=mistakes.py:{name}", f"args.mistake={str(mistake).lower()}"),
                max_train_samples=29,  # 12, 12 and 5 a step: the fourth begins a new epoch
                max_eval_samples=17,
                keep=tmp_path_factory.mktemp("runs"),
            )
            made[name, mistake] = Judge(lab)
        return made[name, mistake]

    return judge


def of_one(judge: Judge, pair: Pair) -> Result:
    (result,) = judge.judge([pair])
    return result


@dataclass(frozen=True)
class Mistake:
    """A mistake, the pair that shows it, and what is to be said of it."""

    name: str
    clause: str
    says: str
    """A part of what is found or likely."""
    pair: Pair = DDP
    step: int = 1

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.name}, {self.pair.name}"


CATALOGUE = [
    Mistake("StaleSample", DATA, "other data on rank 1"),
    Mistake("StaleSample", DATA, "its [0] differs", DDP3),
    Mistake("PrivateGenerator", DATA, "a generator of its own", RESUMED),
    Mistake("PrivateGenerator", DATA, "a generator of its own"),
    Mistake("PrivateGenerator", DATA, "a generator of its own", EXACT),
    Mistake("SumForMean", LOSS, "a sum, not a mean: return Loss(sum, n)"),
    Mistake("SumForMean", LOSS, "a sum, not a mean: return Loss(sum, n)", MICRO),
    Mistake("MeanOfPositives", LOSS, "a mean of something else than samples"),
    Mistake("InBatch", LOSS, "looks at the whole local batch"),
    Mistake("BranchesOnRank", LOSS, "on rank 1"),
    Mistake("ReadsWorldSize", LOSS, "reads its rank or world size"),
    Mistake("StepsInLoss", SCHEDULE, "stepped in loss()", MICRO),
    Mistake("Updates", UPDATE, "the optimizer is stepped"),
    Mistake("Counts", STATE, "attribute calls", RESUMED, 4),
    Mistake("Counts", STATE, "changes with every call of loss()", MICRO),
    Mistake("Counts", STATE, "attribute calls", EXACT),
    Mistake("Averages", STATE, "attribute ema", RESUMED, 5),
    Mistake("Averages", STATE, "attribute ema", MICRO, 5),
    Mistake("Teacher", STATE, "attribute ema", RESUMED, 4),
    Mistake("OwnNoise", STATE, "a generator of its own: attribute noise"),
    Mistake("OwnRate", SCHEDULE, "of group 1 is 0.004 on rank 1, not 0.003", DDP3, 3),
    Mistake("WritesWeights", REPLICAS, "a write to the parameters"),
    Mistake("ScaledGradient", GRADIENT, "2.weight"),
    Mistake("OwnStart", START, "of rank 1 differ", DDP3, 0),
    Mistake("Evaluated", EVALUATION, "", step=5),
]


@pytest.mark.parametrize("mistake", CATALOGUE, ids=lambda mistake: mistake.id)
def test_a_mistake_is_found_and_its_cause_named(judges: Any, mistake: Mistake) -> None:
    result = of_one(judges(mistake.name, True), mistake.pair)
    assert result.verdict == "different", result
    assert result.finding is not None
    found = result.finding
    assert (found.clause, found.step) == (mistake.clause, mistake.step), found
    assert mistake.says in f"{found.found} {found.likely}", found


REFUSED = [
    Mistake("StaleFile", "", "train_dataset() differs on rank 1", DDP3),
    Mistake("StaleFile", "", "element [0][2] is"),
    Mistake("ShardsItself", "", "data.stream: sharded"),
    Mistake("ShufflesByRank", "", "train_dataset()", DDP3),
    Mistake("SkipsOne", "", "rank 1", DDP3),
    Mistake("OrderByRank", "", "order of samples differs"),
    Mistake("OwnDecay", "", "weight_decay of group 0 is 0.1 on rank 1"),
    Mistake("FreezesByRank", "", "rank 1"),
]


@pytest.mark.parametrize("mistake", REFUSED, ids=lambda mistake: mistake.id)
def test_a_mistake_that_a_launch_refuses_is_told_in_its_words(
    judges: Any, mistake: Mistake
) -> None:
    result = of_one(judges(mistake.name, True), mistake.pair)
    assert result.verdict == "failed", result
    assert mistake.says in result.failure


@pytest.mark.parametrize(
    ("name", "pair"),
    list(dict.fromkeys((mistake.name, mistake.pair) for mistake in [*CATALOGUE, *REFUSED])),
    ids=lambda value: value.name if isinstance(value, Pair) else value,
)
def test_the_same_task_without_the_mistake_passes(judges: Any, name: str, pair: Pair) -> None:
    result = of_one(judges(name, False), pair)
    assert result.passed, result
    assert result.finding is None
