"""Exactly once: what is right passes, and every fault is told by rank, step and sample."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dtrain.testing import run_ranks
from dtrain.train.data import exactly_once
from dtrain.train.data.order import shuffled
from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position
from support.errors import assert_shown
from support.feeds import Fault, Fed, Weighted, feed, spec

WORLD = 3
JOB = spec(1000, 30)  # 34 steps an epoch, the last of 10 samples


def at(position: int, epoch: int = 0) -> int:
    """The sample at a position of JOB."""
    return int(shuffled(1000, 5).epoch(epoch).block(position, position + 1)[0])


def many(world_size: int, *calls: dict[str, object]) -> list[list[Fed]]:
    """For each call of `feed`, the results of all ranks, from one start of ranks."""
    return list(zip(*run_ranks(_each, world_size, calls), strict=True))  # type: ignore[arg-type]


def _each(calls: list[dict[str, object]]) -> list[Fed]:
    return [feed(**call) for call in calls]  # type: ignore[arg-type]


def the_error(results: list[Fed]) -> str:
    errors = {fed.error for fed in results}
    assert len(errors) == 1, errors  # the same on every rank
    (error,) = errors
    assert error is not None
    return error


def test_right_data_passes_in_every_layout() -> None:
    fine = many(
        WORLD,
        {"job": JOB},
        {"job": spec(1000, 30, steps=45)},
        {"job": JOB, "check_every": 5},
        {"job": spec(1000, 30, micro_batch_size=3)},
        {"job": spec(7, 30, epochs=5)},
        {"job": spec(40, 2)},
        {"job": spec(300, 50, workers=2, epochs=1)},
        {"job": spec(1000, 30), "task": Weighted(1000)},
    )
    for results in fine:
        assert [fed.error for fed in results] == [None] * WORLD
        assert all(fed.state == results[0].state for fed in results)


TWICE, MISSING, OTHER = "too often", "did not read", "instead of"
FAULTS = [
    (Fault("double", 1, 7), {}, TWICE),
    (Fault("drop", 2, 30), {}, MISSING),
    (Fault("swap", 0, 0), {}, OTHER),
    (Fault("double", 0, 60), {}, TWICE),
    (Fault("drop", 1, 40), {"job": spec(1000, 30, steps=45)}, MISSING),
    (Fault("swap", 2, 14), {"check_every": 5}, OTHER),
    (Fault("drop", 1, 20), {"job": spec(1000, 30, workers=2)}, MISSING),
]
CODE = "data.not-exactly-once"


def test_faults_are_named_by_rank_step_and_sample() -> None:
    calls = [{"job": JOB, "fault": fault, **rest} for fault, rest, _ in FAULTS]
    for results, (fault, _, how) in zip(many(WORLD, *calls), FAULTS, strict=True):
        epoch, step = divmod(fault.step, 34)
        position = 30 * step + 10 * fault.rank
        sample = at(position, epoch)
        place = f"rank {fault.rank}, step {fault.step + 1}: "
        names = [f"sample {sample} "]
        if how == MISSING:
            names.append(f"(position {position})")
        if how == OTHER:
            names.append(f"sample {(sample + 1) % 1000} ")
        error = the_error(results)
        assert_shown(error, CODE, f"epoch {epoch}", place, how, *names)
        assert len(re.findall("rank ", error)) == 1
        # nothing later is trained on: an epoch's end, or a checkpoint, is as far as it goes
        assert all(fed.step <= 34 * (epoch + 1) for fed in results)


def test_weighted_draws_and_whole_epochs_that_are_wrong() -> None:
    weighted, stale, many_steps = many(
        WORLD,
        {"job": JOB, "task": Weighted(1000), "fault": Fault("drop", 1, 3)},
        {"job": JOB, "fault": Fault("epoch", 1, 34)},
        {"job": spec(1000, 3), "fault": Fault("double", 2, 300)},
    )
    assert_shown(the_error(weighted), CODE, "rank 1, step 4: ", MISSING)
    assert_shown(the_error(stale), CODE, "rank 1, step 35: ", "epoch 0 instead of epoch 1")
    # 334 steps in at most 64 ranges of 8
    assert_shown(the_error(many_steps), CODE, "rank 2, steps 297 to 304: ")


def test_a_resume_on_another_world_size_continues_the_proof() -> None:
    parts = run_ranks(feed, 4, JOB, steps=20)
    assert parts[0].position.consumed == 600
    (rest,) = run_ranks(feed, 1, JOB, start=parts[0])
    assert rest.error is None
    assert rest.step == 68
    (late,) = run_ranks(feed, 1, JOB, start=parts[0], lie=30)
    assert late.error is not None
    assert_shown(late.error, CODE, "position 630 of epoch 0")
    # a state that claims one sample fewer than were read, as after a lost step
    wrong = replace(parts[0], state={"proof": {**parts[0].state["proof"], "sums": [1, 2, 600]}})
    results = run_ranks(feed, 2, JOB, start=wrong)
    assert_shown(the_error(results), CODE, "1000 samples")


def test_an_epoch_that_ends_too_early_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `drop_last` would: the last ten samples are planned for nobody."""
    monkeypatch.setattr(EpochPlan, "batches", _without_the_tail)
    error = feed(JOB).error
    assert error is not None
    assert_shown(error, CODE, "every rank ", "990")


def _without_the_tail(course: EpochPlan, step: int, position: Position) -> Iterator[GlobalBatch]:
    whole = EpochPlan(990, course.global_batch_size, course.epochs, course.steps)
    return _BATCHES(whole, step, position)


_BATCHES = EpochPlan.batches


def test_long_epochs_are_checked_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is left to check when a job must leave at once."""
    monkeypatch.setattr(exactly_once, "_MAX_SAMPLES", 300)
    late = feed(JOB, Fault("drop", 0, 2))
    assert late.error is not None
    assert_shown(late.error, CODE, "rank 0, step 3: ", MISSING)
    assert late.step == 10
    assert feed(JOB).error is None


@pytest.mark.ranks(2)
def test_a_split_that_overlaps_is_reported_with_its_steps(rank: int) -> None:
    import dtrain.train.data.placement as placement

    whole = placement.GlobalBatch.micro_batches

    def both_take_the_first(self, rank, world_size, size):  # type: ignore[no-untyped-def]
        return whole(self, 0 if self.step == 5 else rank, world_size, size)

    placement.GlobalBatch.micro_batches = both_take_the_first  # type: ignore[method-assign]
    error = feed(JOB).error
    assert error is not None
    assert_shown(error, CODE, "all ranks together, step 6: ", "positions 150 to 179", "overlap")
