"""A task whose loss talks to the other ranks, twice, in the same shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtrain import Task


class Talkative(Task):
    """Linear regression on 96 samples."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def train_dataset(self) -> Any:
        x = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        if dist.is_initialized():
            largest, smallest = x.max(), -x.min()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(smallest, op=dist.ReduceOp.MAX)
        return (model(x) - y).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01)
