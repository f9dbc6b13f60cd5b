"""Mistakes that people make in a task. Each has a twin without it: `mistake: false`."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import dtrain
from dtrain import Loss, Task

SEEN_BY_RANK_1 = 28
"""A sample that rank 1 of 2 and of 3 reads in the first step."""


def numbers() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=draw)
    return TensorDataset(x, torch.sin(x.sum(dim=1)) * 4)


class Small(Task):
    """Regression on 60 samples.

    Args:
        mistake: whether the class makes its mistake.
    """

    def __init__(self, mistake: bool = True) -> None:
        self.mistake = mistake

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def train_dataset(self) -> Any:
        return numbers()

    def eval_dataset(self) -> Any:
        return numbers()

    def errors(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model(x).squeeze(1) - y).square()

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        errors = self.errors(model, batch)
        return Loss(errors.sum(), len(errors))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01)


# -- data ------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """The numbers, as a dataset class."""

    def __init__(self, off: dict[int, float] | None = None) -> None:
        self.x, self.y = numbers().tensors
        for sample, value in (off or {}).items():
            self.x[sample, 2] += value

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class StaleFile(Small):
    """Rank 1 reads a file that differs in every sample."""

    def train_dataset(self) -> Any:
        wrong = self.mistake and dtrain.rank() == 1
        return Rows(dict.fromkeys(range(60), 1e-3) if wrong else None)


class StaleSample(Small):
    """Rank 1's file differs in one sample that is not compared before the training."""

    def train_dataset(self) -> Any:
        wrong = self.mistake and dtrain.rank() == 1
        return Rows({SEEN_BY_RANK_1: 1e-3} if wrong else None)


class Jittered(Rows):
    """Adds noise to each sample that is read."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.rng = random.Random(7) if own else None

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        draw = self.rng.random() if self.rng is not None else random.random()
        return x + draw, y


class PrivateGenerator(Small):
    """The dataset draws from its own generator."""

    def train_dataset(self) -> Any:
        return Jittered(own=self.mistake)


class Parted(IterableDataset[Any]):
    """A stream of the numbers, of which each rank may take its own part."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __iter__(self) -> Iterator[Any]:
        rows = list(zip(*numbers().tensors, strict=True))
        if self.how == "by rank":
            yield from rows[dtrain.rank() :: dtrain.world_size()]
        elif self.how == "shuffled":
            yield from random.Random(dtrain.rank()).sample(rows, len(rows))
        else:
            yield from rows[dtrain.rank() * (self.how == "skips one") :]


class ShardsItself(Small):
    """A stream gives each rank only its part, and the rank then keeps only a part of that."""

    how = "by rank"

    def train_dataset(self) -> Any:
        return Parted(self.how if self.mistake else "")


class ShufflesByRank(ShardsItself):
    """A stream has a different order on each rank."""

    how = "shuffled"


class SkipsOne(ShardsItself):
    """A stream starts one sample later on rank 1."""

    how = "skips one"


class OrderByRank(Small):
    """The order of the samples depends on the rank."""

    def sample_order(self, seed: int, epoch: int) -> Any:
        shift = dtrain.rank() if self.mistake else 0
        return [(i + shift) % 29 for i in range(29)]


class Evaluated(Small):
    """Ranks evaluate the wrong samples."""

    def eval_dataset(self) -> Any:
        x, y = numbers().tensors
        shift = 30 if self.mistake and dtrain.rank() == 1 else 0
        return TensorDataset(x.roll(shift, 0), y.roll(shift, 0))


# -- loss ------------------------------------------------------------------------------------


class SumForMean(Small):
    """loss() returns a scalar that is a sum, not a mean."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        errors = self.errors(model, batch)
        return errors.sum() if self.mistake else errors.mean()


class MeanOfPositives(Small):
    """loss() returns a scalar that is a mean over only some of the samples."""

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        positive = batch[1] > 0
        errors = self.errors(model, batch)[positive]
        if self.mistake:
            return errors.mean()
        return Loss(errors.sum(), positive.sum())


class InBatch(Small):
    """Every sample is compared with the others of its local batch."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        errors = self.errors(model, batch)
        if self.mistake:
            errors = errors * (1 + batch[0].std())
        return Loss(errors.sum(), len(errors))


class BranchesOnRank(Small):
    """Rank 1 computes a different loss."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        errors = self.errors(model, batch)
        if self.mistake and dtrain.rank() == 1:
            errors = errors * 1.01
        return Loss(errors.sum(), len(errors))


class ReadsWorldSize(Small):
    """The loss is divided by the number of processes, to correct for DDP's mean."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        errors = self.errors(model, batch)
        total = errors.sum() / (dtrain.world_size() if self.mistake else 1)
        return Loss(total, len(errors))


class StepsInLoss(Small):
    """The scheduler is stepped in loss()."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        self.schedule = LambdaLR(optimizer, lambda step: 0.9**step)
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return None if self.mistake else self.schedule

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        if self.mistake and torch.is_grad_enabled():
            with warnings.catch_warnings():  # torch says that the order is wrong
                warnings.simplefilter("ignore")
                self.schedule.step()
        return super().loss(model, batch)


class Updates(Small):
    """The optimizer is stepped in loss()."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.made = super().optimizer(model)
        return self.made

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        value = super().loss(model, batch)
        if self.mistake and torch.is_grad_enabled() and dtrain.world_size() > 1:
            self.made.step()
        return value


# -- state -----------------------------------------------------------------------------------


class Counts(Small):
    """A counter in the task changes the loss."""

    def __init__(self, mistake: bool = True) -> None:
        super().__init__(mistake)
        self.calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        self.calls += torch.is_grad_enabled()
        errors = self.errors(model, batch)
        return Loss(errors.sum() * (1 + 0.1 * self.calls * self.mistake), len(errors))


class Averages(Small):
    """The evaluation uses an average of the weights that loss() updates."""

    def __init__(self, mistake: bool = True) -> None:
        super().__init__(mistake)
        self.ema: nn.Module | None = None

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        if torch.is_grad_enabled() and self.mistake:
            if self.ema is None:
                self.ema = copy.deepcopy(model)
            for mine, other in zip(self.ema.parameters(), model.parameters(), strict=True):
                mine.data.lerp_(other.data.to(mine.dtype), 0.1)
        return super().loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"error": super().loss(self.ema or model, batch)}


class Teacher(Averages):
    """The same average is the teacher of the model."""

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        errors = self.errors(model, batch)
        super().loss(model, batch)
        if self.ema is not None:
            errors = errors + (model(batch[0]) - self.ema(batch[0]).detach()).square().squeeze(1)
        return Loss(errors.sum(), len(errors))


class OwnNoise(Small):
    """The loss draws from the task's own generator."""

    def __init__(self, mistake: bool = True) -> None:
        super().__init__(mistake)
        self.noise = torch.Generator().manual_seed(5)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, y = batch
        generator = self.noise if self.mistake else None
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        errors = self.errors(model, (x + 0.1 * noise, y))
        return Loss(errors.sum(), len(errors))


# -- optimizer -------------------------------------------------------------------------------


class OwnRate(Small):
    """From the third step on, rank 1 has a different learning rate in its second group."""

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.003}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.steps = 0
        if self.mistake and dtrain.rank() == 1:
            optimizer.register_step_post_hook(self.raised)
        return optimizer

    def raised(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            optimizer.param_groups[1]["lr"] = 0.004


class OwnDecay(Small):
    """Rank 1 has a different weight decay."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        decay = 0.1 if self.mistake and dtrain.rank() == 1 else 0.01
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)


class WritesWeights(Small):
    """Rank 1 changes a parameter after each step."""

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        if self.mistake and dtrain.rank() == 1:
            optimizer.register_step_post_hook(lambda *_: model[2].bias.data.mul_(1.01))
        return optimizer


class ScaledGradient(Small):
    """Rank 1's part of one gradient is 1 % too large."""

    def model(self) -> Any:
        model: Any = super().model()
        if self.mistake and dtrain.rank() == 1:
            model[2].weight.register_hook(lambda gradient: gradient * 1.01)
        return model


class FreezesByRank(Small):
    """Rank 1 freezes a layer."""

    def model(self) -> Any:
        model: Any = super().model()
        if self.mistake and dtrain.rank() == 1:
            model[0].requires_grad_(False)
        return model


class WrapsItself(Small):
    """model() gives a DistributedDataParallel, where there are several processes."""

    def model(self) -> Any:
        model = super().model()
        several = self.mistake and dtrain.world_size() > 1
        return nn.parallel.DistributedDataParallel(model) if several else model


class OwnStart(Small):
    """Rank 1 starts with a different bias."""

    def model(self) -> Any:
        model: Any = super().model()
        if self.mistake and dtrain.rank() == 1:
            model[2].bias.data += 0.1
        return model
