"""What a task's loss may be, and the errors when it is something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Loss, Task
from dtrain.train.loss import NO_SAMPLES, LossModule, read_loss
from support.errors import raises


def test_a_scalar_is_a_mean_over_the_samples() -> None:
    total, weight = read_loss(torch.tensor(0.5), 8)
    assert (total.item(), weight) == (4.0, 8.0)
    total, weight = read_loss(torch.tensor([[0.5]]), 8)
    assert (total.shape, total.item()) == ((), 4.0)
    assert read_loss(0.25, 4)[0].item() == 1.0


def test_a_loss_is_taken_as_it_is() -> None:
    weight = torch.tensor([3.0], requires_grad=True)
    total, read = read_loss(Loss(torch.tensor([7.0]), weight), 8)
    assert total.item() == 7.0
    assert isinstance(read, torch.Tensor)
    assert (read.shape, read.requires_grad) == ((), False)
    total, read = read_loss(Loss(torch.tensor(7), 2), 8)  # as a count of right answers
    assert (total.item(), read) == (7, 2)


def test_half_precision_is_widened_before_it_is_multiplied() -> None:
    total, _ = read_loss(torch.tensor(300.0, dtype=torch.float16), 1000)
    assert total.item() == 300_000.0


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (torch.ones(3), ["(3,)", "mean"]),
        (Loss(torch.ones(2, 2), 4), ["Loss", " sum ", "(2, 2)"]),
        (Loss(torch.tensor(1.0), torch.ones(2)), ["Loss", " weight ", "(2,)"]),
        ({"loss": 1}, ["dict", "dtrain.task.Loss(sum, weight)"]),
        (None, ["NoneType", "dtrain.task.Loss(sum, weight)"]),
    ],
)
def test_anything_else_is_an_error_that_names_what_to_return(value: Any, names: list[str]) -> None:
    with raises("task.loss-not-scalar", "loss()", *names):
        read_loss(value, 4)


class Fixed(Task):
    def __init__(self, value: Any) -> None:
        self.value = value

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self.value


def test_a_loss_without_a_graph() -> None:
    module = LossModule(nn.Linear(1, 1), Fixed(torch.tensor(1.0)))
    line = Fixed.loss.__code__.co_firstlineno
    with raises("task.loss-without-graph", f"{Path(__file__).name}:{line}: loss()"):
        module([0], 1)
    with torch.no_grad():
        module([0], 1)


def test_no_samples_reach_every_parameter_with_a_gradient_of_exactly_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    total, weight = LossModule(model, Fixed(None))(NO_SAMPLES, 0)
    total.backward()
    assert weight == 0.0
    for parameter in [*model[0].parameters(), *model[1].parameters()]:
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0
    assert model[2].weight.grad is None
