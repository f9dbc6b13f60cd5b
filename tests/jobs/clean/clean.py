"""Ordinary tasks without a mistake, of the kinds that people train."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import dtrain
from dtrain import Loss, Task

SAMPLES, SIZE, CLASSES = 96, 8, 4


def pictures() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, SIZE, generator=draw)
    return TensorDataset(x, (x[:, :CLASSES]).argmax(dim=1))


class Plain(Task):
    """Classifies."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(SIZE, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def train_dataset(self) -> Any:
        return pictures()

    def eval_dataset(self) -> Any:
        return pictures()

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        x, y = batch
        return Loss(functional.cross_entropy(model(x), y, reduction="sum"), len(y))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


class Mean(Plain):
    """Returns a scalar, with a schedule and two groups of parameters."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return functional.cross_entropy(model(x), y)

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


class FunctionalDropout(Plain):
    """Drops in a function, with a rate that no module shows."""

    def loss(self, model: Any, batch: Any) -> Loss:
        x, y = batch
        scores = model(functional.dropout(x, 0.3))
        return Loss(functional.cross_entropy(scores, y, reduction="sum"), len(y))


class BatchNorm(Plain):
    """Normalises over the batch."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(SIZE, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)
        )


class Convolution(Plain):
    """A convolution, with group norm."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, SIZE)),
            nn.Conv1d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * (SIZE - 2), CLASSES),
        )


class Diffusion(Plain):
    """A step of a diffusion model: noise of a drawn strength is to be told."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(SIZE + 1, 16), nn.SiLU(), nn.Linear(16, SIZE))

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, _ = batch
        time = torch.randint(1, 100, (len(x), 1), device=x.device) / 100
        noise = torch.randn_like(x)
        noisy = x * (1 - time).sqrt() + noise * time.sqrt()
        told = model(torch.cat([noisy, time.to(x.dtype)], dim=1))
        return Loss((told - noise).square().mean(dim=1).sum(), len(x))


class NumPyNoise(Plain):
    """Draws from NumPy's and Python's generators in the loss."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        x, y = batch
        noise = torch.from_numpy(np.random.randn(*x.shape)).to(x.dtype) * random.random()
        scores = model(x + 0.1 * noise)
        return Loss(functional.cross_entropy(scores, y, reduction="sum"), len(y))


class LoRA(nn.Module):
    """A frozen layer with a low-rank change."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


class Adapted(Plain):
    """Trains adapters of a frozen model."""

    def model(self) -> nn.Module:
        return nn.Sequential(LoRA(nn.Linear(SIZE, 16)), nn.ReLU(), LoRA(nn.Linear(16, CLASSES)))


class Words(nn.Module):
    """Embeds, and scores with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES * 2, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES * 2, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(words))[0])


class Tied(Plain):
    """A language model with tied weights, and a loss over words, of which samples have unequal
    numbers."""

    def model(self) -> nn.Module:
        return Words()

    def train_dataset(self) -> Any:
        draw = torch.Generator().manual_seed(2)
        words = torch.randint(1, CLASSES * 2, (SAMPLES, 7), generator=draw)
        lengths = torch.randint(2, 8, (SAMPLES, 1), generator=draw)
        return TensorDataset(torch.where(torch.arange(7) < lengths, words, 0))

    eval_dataset = train_dataset

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        (words,) = batch
        scores, following = model(words[:, :-1]), words[:, 1:]
        known = following > 0
        total = functional.cross_entropy(scores[known], following[known], reduction="sum")
        return Loss(total, known.sum())


class Attention(Plain):
    """A transformer's block, with dropout in it."""

    def model(self) -> nn.Module:
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        return nn.Sequential(nn.Unflatten(1, (1, SIZE)), block, nn.Flatten(), nn.Linear(8, CLASSES))


class Recomputed(Plain):
    """Computes a layer again in backward, noise and dropout included."""

    def loss(self, model: Any, batch: Any) -> Loss:
        x, y = batch

        def noisy(x: torch.Tensor) -> torch.Tensor:
            return model[0](functional.dropout(x + 0.1 * torch.randn_like(x), 0.2))

        scores = model[2](model[1](checkpoint(noisy, x, use_reentrant=False)))
        return Loss(functional.cross_entropy(scores, y, reduction="sum"), len(y))


class Auxiliary(nn.Module):
    """A second head, which only some samples reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare = nn.Linear(SIZE, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES)


class RareHead(Plain):
    """Uses a layer for the samples of one class only."""

    def model(self) -> nn.Module:
        return Auxiliary()

    def loss(self, model: Any, batch: Any) -> Loss:
        x, y = batch
        hidden = torch.tanh(model.first(x))
        total = functional.cross_entropy(model.last(hidden), y, reduction="sum")
        if (y == 3).any():
            total = total + model.rare(hidden[y == 3]).square().sum()
        return Loss(total, len(y))


class Jittered(Dataset[Any]):
    """Samples with random changes, from all global generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        x, y = pictures()[index]
        return x + 0.1 * torch.randn(SIZE) + random.random() + np.random.rand(), y


class Augmented(Plain):
    """Changes samples at random as they are read."""

    def train_dataset(self) -> Any:
        return Jittered()


class Lines(IterableDataset[Any]):
    """A stream, with random changes."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in pictures():
            yield x + 0.1 * torch.randn(SIZE), y


class Stream(Plain):
    """Reads a stream."""

    def train_dataset(self) -> Any:
        return Lines()


class Weighted(Plain):
    """Draws samples by weight."""

    def sample_weights(self) -> Any:
        return [1 + i % 3 for i in range(SAMPLES)]


class Averaged(Plain):
    """Evaluates an average of the weights, which is its teacher as well."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.ema = dtrain.EMA(model, 0.9)
        return super().optimizer(model)

    def callbacks(self) -> Any:
        return [self.ema]

    def loss(self, model: Any, batch: Any) -> Loss:
        x, y = batch
        scores = model(x)
        total = functional.cross_entropy(scores, y, reduction="sum")
        if model.training:
            total = total + (scores - self.ema.model(x)).square().sum()
        return Loss(total, len(y))


class Clipped(Plain):
    """Two losses, a buffer that counts steps, no momentum."""

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("steps", torch.zeros(()))
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: model.steps.add_(1))
        return optimizer

    def loss(self, model: Any, batch: Any) -> Loss:
        x, y = batch
        scores = model(x) / (1 + 0.1 * model.steps)
        smooth = functional.cross_entropy(scores, y, reduction="sum", label_smoothing=0.1)
        return Loss(smooth + 0.01 * scores.square().sum(), len(y))
