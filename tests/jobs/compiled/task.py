"""A small model that drops, and that may compute something else when it is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtrain import Task


class Net(nn.Module):
    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.drop = nn.Dropout(0.3)
        self.differs = differs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.drop(x))
        return out * 2 if self.differs and torch.compiler.is_compiling() else out


class Compiled(Task):
    def __init__(self, differs: bool = False) -> None:
        self.differs = differs

    def model(self) -> nn.Module:
        return Net(self.differs)

    def train_dataset(self) -> Any:
        return torch.utils.data.TensorDataset(torch.linspace(0, 1, 64).reshape(16, 4))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = (model(batch[0]) - 1).square().mean()
        return loss

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)
