"""A small language model of bytes, trained on Python's own standard library.

Each sample is one paragraph of a module, so samples have different lengths. The loss gives every
byte the same weight, on any number of processes and with any micro-batches.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dtrain import Loss, Task

START = 256  # after the 256 bytes
NOTHING = -100  # a target that cross_entropy ignores

Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.after_attention = nn.Linear(width, width, bias=False)
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map shape (samples, length, width) to the same shape."""
        samples, length, width = x.shape
        made = self.queries_keys_values(self.before_attention(x))
        made = made.view(samples, length, 3, self.heads, width // self.heads)
        queries, keys, values = made.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.after_attention(seen.transpose(1, 2).reshape(x.shape))
        return x + self.network(x)


class Decoder(nn.Module):
    """A decoder-only transformer: scores for the next byte at every position."""

    def __init__(self, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(START + 1, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.scores = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map shape (samples, length) to (samples, length, 256)."""
        return self.scores(self.blocks(self.bytes(x) + self.positions[: x.shape[1]]))


class Text(Task):
    """Predicts the next byte: 3.1 bits per byte of unseen modules after 300 steps."""

    def __init__(
        self,
        modules: int = 60,
        length: int = 128,
        width: int = 64,
        depth: int = 2,
        lr: float = 0.01,
        steps: int = 300,
    ) -> None:
        self.length = length
        self.shape = (length, width, depth)
        self.lr = lr
        self.steps = steps
        folder = Path(sysconfig.get_paths()["stdlib"])
        self.files = sorted(folder.glob("*.py"))[:modules]

    def paragraphs(self, files: list[Path]) -> list[torch.Tensor]:
        """Return every paragraph with at least 20 bytes, cut to the model's length."""
        texts = [part for file in files for part in file.read_bytes().split(b"\n\n")]
        return [torch.tensor([START, *text[: self.length]]) for text in texts if len(text) >= 20]

    def train_dataset(self) -> list[torch.Tensor]:
        """Return the paragraphs of nine modules out of ten."""
        return self.paragraphs([file for i, file in enumerate(self.files) if i % 10])

    def eval_dataset(self) -> list[torch.Tensor]:
        """Return the paragraphs of every tenth module, which the model does not train on."""
        return self.paragraphs(self.files[::10])

    def collate(self, samples: list[torch.Tensor]) -> Batch:
        """Return inputs and targets of shape (samples, length of the longest)."""
        return (
            pad_sequence([sample[:-1] for sample in samples], batch_first=True),
            pad_sequence([sample[1:] for sample in samples], True, padding_value=NOTHING),
        )

    def model(self) -> nn.Module:
        """Return a decoder with 140,864 parameters."""
        return Decoder(*self.shape, heads=4)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the sum over all bytes, and the number of bytes."""
        inputs, targets = batch
        total = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        return Loss(total, (targets != NOTHING).sum())

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return AdamW over all parameters."""
        return AdamW(model.parameters(), lr=self.lr, weight_decay=0.1)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Increase the learning rate over 20 steps, then decrease it along a cosine."""

        def rate(step: int) -> float:
            return min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * min(1, step / self.steps)))

        return LambdaLR(optimizer, rate)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Loss]:
        """Return the bits per byte."""
        loss = self.loss(model, batch)
        return {"bits_per_byte": Loss(loss.sum / math.log(2), loss.weight)}
