"""Handwritten digits with a hand-written loop; it also runs with `torchrun train.py`.

The script uses these optional parts of dtrain: `sampler` (each sample exactly once, also after a
restart in the middle of an epoch), `checkpoint` (verified bytes), `check` (the replicas are one
model) and `stopping` (save and exit when asked to).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import dtrain


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,437 images for training, and the other 360."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    classes = torch.tensor(labels)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return (
        TensorDataset(images[order[360:]], classes[order[360:]]),
        TensorDataset(images[order[:360]], classes[order[:360]]),
    )


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the fraction of correct images; each process evaluates its own part."""
    mine = range(dtrain.rank(), len(data), dtrain.world_size())
    images, classes = data[list(mine)]
    with torch.no_grad():
        right = (model(images).argmax(dim=1) == classes).sum()
    dist.all_reduce(right)
    return right.item() / len(data)


def main() -> None:
    """Train, starting from the newest checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--crash-at", type=int, help="on purpose, once, at this step on rank 1")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    train, held_out = digits()
    model = DistributedDataParallel(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    sampler = dtrain.sampler(train, global_batch_size=64, seed=0)
    loader = DataLoader(train, batch_sampler=sampler)
    saved = dtrain.checkpoint(model, optimizer, sampler=sampler)

    step = saved.load()
    while sampler.epoch < options.epochs:
        for images, classes in loader:
            loss = cross_entropy(model(images), classes)
            optimizer.zero_grad()
            (loss * sampler.scale).backward()
            optimizer.step()
            sampler.step()
            step += 1
            if step % 10 == 0:
                dtrain.check(model, optimizer)
                saved.save(step)
            if step == options.crash_at and dtrain.rank() == 1 and not _restarted():
                raise RuntimeError(f"a crash on purpose at step {step}")
            if dtrain.stopping():
                saved.save(step)
                return
        right = accuracy(model.module, held_out)
        if dtrain.rank() == 0:
            print(f"epoch {sampler.epoch}: {right:.1%} of the held-out digits are right")
    saved.save(step)


def _restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


if __name__ == "__main__":
    main()
