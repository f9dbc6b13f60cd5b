"""nn.DataParallel's semantics without GPUs: dealt, copied, added up as torch does."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Loss, Task
from dtrain.train.loss import LossModule
from dtrain.train.strategies.dp import (
    CpuDataParallel,
    GatherableLoss,
    check_scatterable,
    replicate,
    scatter,
)
from support.errors import raises

Pair = namedtuple("Pair", "x y")


class Summed(Task):
    def loss(self, model: nn.Module, batch: Any) -> Loss:
        return Loss(model(batch["x"]).square().sum(), batch["w"].sum())


def test_scatter_cuts_nested_batches_as_torch_chunks_them() -> None:
    x = torch.arange(10).reshape(5, 2)
    batch = {"a": x, "b": [x[:, 0], Pair(x[:, 1], None)], "c": {}}
    parts = scatter(batch, 4)
    assert [part["a"].tolist() for part in parts] == [c.tolist() for c in x.chunk(4)]
    assert len(parts) == 3  # 2 + 2 + 1: torch makes fewer parts rather than smaller ones
    assert [part["b"][0].tolist() for part in parts] == [[0, 2], [4, 6], [8]]
    assert isinstance(parts[0]["b"][1], Pair)
    assert parts[2]["b"][1].x.tolist() == [9]
    assert parts[1]["c"] == {}


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"x": torch.ones(4), "n": torch.tensor(3)}, ["batch['n'] ", " () ", "batch of 4"]),
        ([torch.ones(4), torch.ones(2, 4)], ["batch[1] ", "(2, 4)", "batch of 4"]),
        ([torch.ones(4), ["a", "b", "c", "d"]], ["batch[1][0] ", " str"]),
        ({"x": torch.ones(4), "scale": 2.0}, ["batch['scale'] ", " float"]),
    ],
)
def test_what_cannot_be_cut_is_named(batch: Any, names: list[str]) -> None:
    with raises("strategy.batch-cannot-be-cut", *names):
        check_scatterable(batch, 4)


def test_gradients_of_all_replicas_reach_the_one_set_of_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batch = {"x": torch.randn(7, 3).double(), "w": torch.rand(7).double()}
    loss = LossModule(model, Summed())
    total, weight = loss(batch, 7)
    total.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    sums, weights = CpuDataParallel(GatherableLoss(loss), 3)(batch, torch.arange(7))
    assert sums.shape == weights.shape == (3,)
    sums.sum().backward()
    torch.testing.assert_close(sums.sum(), total, rtol=0, atol=1e-14)
    torch.testing.assert_close(weights.sum(), weight, rtol=0, atol=1e-14)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-14)


def test_copies_keep_ties_and_throw_their_buffers_away() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    first, second = replicate(model, 2)
    assert first[0].weight is first[2].weight
    assert second[0].weight is second[2].weight
    assert first[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert second[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert list(first.parameters()) == []
    first(torch.randn(5, 3))
    after_first = model[1].running_mean.clone()
    assert after_first.abs().sum() > 0
    second(torch.randn(5, 3))
    assert torch.equal(model[1].running_mean, after_first)
    assert model[1].num_batches_tracked == 1
