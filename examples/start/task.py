"""Which of three spirals does a point belong to? Replace the model, the data and the loss.

Nothing here knows of processes or devices: dtrain moves the model and the batches, and divides the
samples among the processes.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from dtrain import Loss, Task

Batch = list[torch.Tensor]


def spirals(samples: int, seed: int) -> TensorDataset:
    """Make points on three spirals with some noise, and the number of the spiral of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    radius = torch.rand(samples, generator=generator)
    noise = 0.15 * torch.randn(samples, generator=generator)
    angle = 4 * radius + labels * 2 * math.pi / 3 + noise
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return TensorDataset(points, labels)


class Spirals(Task):
    """A network with two hidden layers."""

    def __init__(self, width: int = 64, lr: float = 0.01) -> None:
        self.width = width
        self.lr = lr

    def model(self) -> nn.Module:
        """Return the model, on the CPU."""
        return nn.Sequential(
            nn.Linear(2, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, 3),
        )

    def train_dataset(self) -> TensorDataset:
        """Return the samples to train with: anything that has `len()` and `[i]`."""
        return spirals(3000, seed=0)

    def eval_dataset(self) -> TensorDataset:
        """Return samples that are not trained with."""
        return spirals(600, seed=1)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean over the samples of the batch."""
        points, labels = batch
        return cross_entropy(model(points), labels)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the optimizer. A method `scheduler(optimizer)` may be added."""
        return AdamW(model.parameters(), lr=self.lr)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Loss]:
        """Return sums over the batch; dtrain divides once, over all processes."""
        points, labels = batch
        scores = model(points)
        right = (scores.argmax(dim=1) == labels).sum()
        total = cross_entropy(scores, labels, reduction="sum")
        return {"loss": Loss(total, len(labels)), "accuracy": Loss(right, len(labels))}
