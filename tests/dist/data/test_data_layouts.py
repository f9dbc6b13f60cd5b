"""Real ranks, any sizes, a kill anywhere: the lists of one process, proven on the way."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dtrain.job.spec import JobSpec
from dtrain.testing import run_ranks
from dtrain.train.data.order import order_of
from support.feeds import Fed, Plain, Weighted, feed, spec

sizes = st.integers(1, 80)
cases = st.fixed_dictionaries(
    {
        "n": sizes,
        "batch": sizes,
        "micro": st.one_of(st.none(), st.integers(1, 9)),
        "workers": st.sampled_from([0, 0, 0, 1, 2]),
        "kind": st.sampled_from(["shuffled", "in turn", "weighted"]),
        "stop": st.integers(0, 12),
        "check_every": st.sampled_from([None, 1, 3]),
    }
)


def job_of(case: dict[str, Any]) -> JobSpec:
    micro = case["micro"] and min(case["micro"], case["batch"])
    job = spec(case["n"], case["batch"], workers=case["workers"], micro_batch_size=micro)
    shuffle = case["kind"] != "in turn"
    return job.model_copy(update={"data": job.data.model_copy(update={"shuffle": shuffle})})


def task_of(case: dict[str, Any]) -> Plain:
    return Weighted(case["n"]) if case["kind"] == "weighted" else Plain()


def first_parts(batch_of_cases: list[dict[str, Any]]) -> list[Fed]:
    return [
        feed(job_of(c), task=task_of(c), steps=c["stop"], check_every=c["check_every"])
        for c in batch_of_cases
    ]


def rests(batch_of_cases: list[dict[str, Any]], starts: list[Fed]) -> list[Fed]:
    return [
        feed(job_of(c), task=task_of(c), start=start, check_every=c["check_every"])
        for c, start in zip(batch_of_cases, starts, strict=True)
    ]


def expected(case: dict[str, Any]) -> list[list[int]]:
    order = order_of(task_of(case), case["n"], job_of(case))
    return [
        order.epoch(epoch).block(start, min(start + case["batch"], case["n"])).tolist()
        for epoch in range(2)
        for start in range(0, case["n"], case["batch"])
    ]


def together(results: list[list[Fed]], index: int) -> list[list[int]]:
    ranks = [rank[index] for rank in results]
    assert [fed.error for fed in ranks] == [None] * len(ranks)
    return [list(itertools.chain(*parts)) for parts in zip(*(f.seen for f in ranks), strict=True)]


@given(st.lists(cases, min_size=6, max_size=6), st.permutations([1, 2, 3, 4]))
@settings(
    max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_any_sizes_killed_anywhere_and_resumed_on_another_world_size(
    batch_of_cases: list[dict[str, Any]], world_sizes: list[int]
) -> None:
    before = run_ranks(first_parts, world_sizes[0], batch_of_cases)
    after = run_ranks(rests, world_sizes[1], batch_of_cases, before[0])
    for index, case in enumerate(batch_of_cases):
        assert together(before, index) + together(after, index) == expected(case), case
