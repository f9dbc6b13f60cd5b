"""A script that builds a `Trainer` of its own."""

from __future__ import annotations

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Game(pl.LightningModule):
    """Two optimizers in turn, as in a GAN, with a Trainer of the script's own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.line = torch.nn.Linear(4, 1)
        self.judge = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, index: int) -> None:
        inputs, targets = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self._step(first, -self.judge(self.line(inputs)).mean())
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        self._step(second, (self.judge(self.line(inputs).detach()) - self.judge(targets)).mean())
        self.untoggle_optimizer(second)

    def _step(self, optimizer: Any, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(each.parameters(), lr=0.05) for each in (self.line, self.judge)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args()
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu", devices=options.devices, num_nodes=options.nodes,
        strategy="ddp_find_unused_parameters_true",
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    game = Game()
    trainer.fit(game, DataLoader(data, batch_size=4))
    place = f"rank {trainer.global_rank} of {trainer.world_size}"
    print(f"lightning {place}, {trainer.global_step} steps, {game.line.weight.sum().item()}")


if __name__ == "__main__":
    main()
