"""Handwritten digits: 1,797 images of 8 by 8 pixels from scikit-learn, in ten classes.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset

from dtrain import Loss, Task

Batch = list[torch.Tensor]


class Digits(Task):
    """A small convolutional network; 98 % of the held-out digits are correct after ten epochs."""

    def __init__(self, width: int = 16, lr: float = 0.01, decay_steps: int = 230) -> None:
        self.width = width
        self.lr = lr
        self.decay_steps = decay_steps
        pixels, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.held_out, self.rest = order[:360], order[360:]

    def model(self) -> nn.Module:
        """Return two convolutions and a linear layer, with 5,050 parameters."""
        return nn.Sequential(
            nn.Conv2d(1, self.width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.width, self.width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * self.width, 10),
        )

    def train_dataset(self) -> TensorDataset:
        """Return 1,437 images with their labels."""
        return TensorDataset(self.images[self.rest], self.labels[self.rest])

    def eval_dataset(self) -> TensorDataset:
        """Return the other 360 images."""
        return TensorDataset(self.images[self.held_out], self.labels[self.held_out])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean over the samples of the batch."""
        images, labels = batch
        return cross_entropy(model(images), labels)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return AdamW over all parameters."""
        return AdamW(model.parameters(), lr=self.lr)

    def scheduler(self, optimizer: Optimizer) -> LinearLR:
        """Decrease the learning rate to a twentieth, a little after each optimizer step."""
        return LinearLR(optimizer, 1.0, 0.05, total_iters=self.decay_steps)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Loss]:
        """Return sums over the batch; dtrain divides once, over all ranks."""
        images, labels = batch
        scores = model(images)
        right = (scores.argmax(dim=1) == labels).sum()
        total = cross_entropy(scores, labels, reduction="sum")
        return {"loss": Loss(total, len(labels)), "accuracy": Loss(right, len(labels))}
