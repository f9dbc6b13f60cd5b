"""A LightningModule that logs in all the ways that its users do."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric


class Logs(pl.LightningModule):
    """20 samples whose number is what is logged of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.counted = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (x,) = batch
        loss = self.net(x).square().mean()
        mean = x.mean()
        self.log("train_loss", loss, prog_bar=True)
        self.log("both", mean, on_step=True, on_epoch=True)
        self.log("of_epoch", mean, on_step=False, on_epoch=True)
        self.log_dict({"of_dict": mean, "loss": 100.0 * mean})
        self.log("bar_only", mean, logger=False, prog_bar=True)
        self.log("neither", mean, logger=False, on_epoch=True)
        self.log("step", 7.0)
        self.counted(mean)
        self.log("counted", self.counted, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("at_the_end", 5.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        self.log("val_loss", x.mean())
        self.log("val_both", x.mean(), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(20.0)[:, None]), shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(5.0)[:, None]), batch_size=2)


class Constant(Logs):
    """Logs a value that can be known again."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        value = torch.tensor(12345.5)
        self.log("constant", value, prog_bar=True)
        self.log("constant_of_both", value, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)
