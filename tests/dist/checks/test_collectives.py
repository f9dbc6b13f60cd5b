"""Ranks give one another values of unequal sizes, and their own collectives stay alike in it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dtrain.testing import run_ranks
from dtrain.train import collectives
from dtrain.train.checks import collective_trace


def exchange() -> tuple[Any, ...]:
    collective_trace.install()
    rank = dist.get_rank()
    mine = {"rank": rank, "text": ("x" * 1000 * rank, rank / 3)}
    return (
        collectives.gather_to_all(mine),
        collectives.gather_to_zero(mine),
        collectives.from_zero(mine),
        collectives.bytes_from_rank(2, bytes(rank)),
        collective_trace.CHAIN.value,
        list(collective_trace.CHAIN.tail),
    )


def test_values_of_all_ranks() -> None:
    found = run_ranks(exchange, 3)
    everyone = [{"rank": rank, "text": ("x" * 1000 * rank, rank / 3)} for rank in range(3)]
    assert [each[0] for each in found] == [everyone] * 3
    assert [each[1] for each in found] == [everyone, [], []]
    assert [each[2:4] for each in found] == [(everyone[0], bytes(2))] * 3
    assert found[0][5]
    assert [each[4:] for each in found] == [found[0][4:]] * 3
