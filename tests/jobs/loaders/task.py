"""A task whose data fail in a loader process, in one of several ways."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from dtrain import Loss, Task

BAD = 13


class Rows(Dataset[Any]):
    """Sample `BAD` fails."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.kept: list[int] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        if i == BAD:
            self.fail()
            if self.how == "shape":
                return torch.zeros(2)
        return torch.full((3,), float(i))

    def fail(self) -> None:
        if self.how == "raise":
            raise ValueError("a bad sample")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "_exit":
            os._exit(4)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.how == "descriptors":
            self.kept.append(os.open(os.devnull, os.O_RDONLY))


class Stream(IterableDataset[Any]):
    """The same, as a stream."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self.rows)):
            yield self.rows[i]


class Failing(Task):
    """Fails as it is told.

    Args:
        how: the way.
        where: train, eval, stream or collate.
    """

    def __init__(self, how: str = "", where: str = "train") -> None:
        self.how, self.where = how, where

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def train_dataset(self) -> Any:
        rows = Rows(self.how if self.where in ("train", "stream") else "")
        return Stream(rows) if self.where == "stream" else rows

    def eval_dataset(self) -> Any:
        return Rows(self.how if self.where == "eval" else "")

    def collate(self, samples: list[Any]) -> Any:
        batch = default_collate(samples)
        if self.where == "collate" and any(int(sample[0]) == BAD for sample in samples):
            if self.how == "raise":
                raise ValueError("a bad batch")
            return batch, lambda: None  # cannot be sent
        return batch

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        batch = batch if isinstance(batch, torch.Tensor) else batch[0]
        return Loss((model(batch) / 100).square().sum(), len(batch))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-5)
