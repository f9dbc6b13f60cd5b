"""A job that is the same training everywhere, unless one of the modules beside it is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dtrain import Loss, Task


class Net(nn.Module):
    """Two layers, and a temperature that falls with every step."""

    def __init__(self, norm: bool, dropout: float, tracks: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(16, 1)
        self.tracks = tracks
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tracks and self.training:
            self.mean.lerp_(x.detach().mean(dim=0), 0.1)
        hidden = self.norm(self.first(x) / self.temperature)
        return self.last(self.drop(torch.tanh(hidden))).squeeze(1)


class Small(Task):
    """Regression on 60 samples.

    Args:
        weighted: unequal weights of the samples, instead of a mean over the batch.
        norm: BatchNorm between the layers.
        dropout: its rate.
        tracks: a buffer follows the mean of the inputs.
        scale: of the errors; small enough, fp16 never overflows.
        ordered: the last sample comes first, in every epoch.
    """

    def __init__(
        self,
        weighted: bool = True,
        norm: bool = False,
        dropout: float = 0.0,
        tracks: bool = False,
        scale: float = 1.0,
        ordered: bool = False,
    ) -> None:
        self.ordered = ordered
        self.weighted = weighted
        self.scale = scale
        self.net = norm, dropout, tracks

    def model(self) -> nn.Module:
        return Net(*self.net)

    def train_dataset(self) -> Any:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(60, 6, generator=draw)
        w = torch.rand(60, generator=draw) * 3
        return torch.utils.data.TensorDataset(x, torch.sin(x.sum(dim=1)) * 4, w)

    eval_dataset = train_dataset

    def sample_order(self, seed: int, epoch: int) -> Any:
        return range(59, -1, -1) if self.ordered else None

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        x, y, w = batch
        errors = (model(x) - y).square() * self.scale
        return Loss((errors * w).sum(), w.sum()) if self.weighted else errors.mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: model.temperature.mul_(0.9))
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return LambdaLR(optimizer, lambda step: 0.8**step)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Loss]:
        x, y, _ = batch
        return {"error": Loss((model(x) - y).square().sum(), len(x))}
