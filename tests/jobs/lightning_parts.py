"""LightningModules that are told apart by what becomes of their parameters where these are cut."""

from __future__ import annotations

from typing import Any

import torch
from lightning_shapes import Counting, Manual, Plain
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class OwnParameters(Counting):
    """Parameters of its own, and some that are frozen, shared or left out; calls no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.first = nn.Linear(6, 8)
        self.shared = nn.Linear(8, 1)
        self.net[2].weight = self.shared.weight
        self.held = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.judged(x), y)

    def judged(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(x * self.scale)
        x = torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias))
        return self.net[2](x) + self.shared(x)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        mine = [each.detach() for each in self.parameters()]
        self.held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in mine)

    def on_validation_start(self) -> None:
        if self.global_rank == 0:  # all parameters are here, so nobody else is needed
            self.judged(torch.ones(2, 6))

    on_validation_epoch_end = on_validation_start

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)

    @property
    def remembered(self) -> Any:
        return {"held": torch.tensor(self.held)}


class Twice(torch.optim.SGD):
    """Computes the gradients itself, and updates twice."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


class ByClosure(Manual):
    """Its optimizer is given what computes the gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        losses = []

        def closure() -> Any:
            optimizer.zero_grad()
            losses.append(self.mse(batch))
            self.manual_backward(losses[-1])
            return losses[-1]

        optimizer.step(closure=closure)
        self.log("before", losses[0].detach())
        return losses[-1].detach()

    def configure_optimizers(self) -> Any:
        return Twice(self.parameters(), lr=0.05, momentum=0.9)


class UsedBySome(Plain):
    """Manual optimization: two losses an update, a part that one rank uses, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seldom = nn.Linear(6, 1)
        self.unused = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.net[2].requires_grad_(False)
        self.manual_backward(self.mse(batch))
        self.net[2].requires_grad_(True)
        made = self(x)
        if self.global_rank == 0:  # what another process is not given
            made = made + self.seldom(x)
        self.manual_backward(nn.functional.mse_loss(made, y))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


class CutsItself(Counting):
    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=init_device_mesh("cpu", (2,)))
