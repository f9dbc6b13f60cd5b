"""The training of examples/digits as one writes it by hand for torchrun: DDP and a snapshot.

Run it as `torchrun --nproc-per-node 4 digits.py --steps 230 --snapshot FILE --steps-file FILE`.
Every rank appends a line to the steps file after each step: `rank step time pid`, the time in
seconds since the epoch.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

HELD_OUT = 360
WIDTH = 16
GLOBAL_BATCH_SIZE = 64


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * WIDTH, 10),
    )


def build_data() -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rest = order[HELD_OUT:]
    return TensorDataset(images[rest], torch.tensor(labels)[rest])


def train(steps: int, snapshot: Path, snapshot_every: int, steps_file: Path) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    data = build_data()
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, batch_size=GLOBAL_BATCH_SIZE // world_size, sampler=sampler)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=230)
    step, epoch = 0, 0
    if snapshot.exists():
        saved = torch.load(snapshot, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        step, epoch = saved["step"], saved["epoch"]
    ddp = DistributedDataParallel(model)
    with steps_file.open("a", buffering=1) as log:
        while True:
            sampler.set_epoch(epoch)
            for images, labels in loader:
                loss = nn.functional.cross_entropy(ddp(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                step += 1
                log.write(f"{rank} {step} {time.time()} {os.getpid()}\n")
                if step == steps:
                    return
                if rank == 0 and step % snapshot_every == 0:
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "step": step,
                        "epoch": epoch,
                    }
                    aside = snapshot.with_suffix(".aside")
                    torch.save(state, aside)
                    os.replace(aside, snapshot)
            epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--snapshot-every", type=int, default=20)
    parser.add_argument("--steps-file", type=Path, required=True)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    train(arguments.steps, arguments.snapshot, arguments.snapshot_every, arguments.steps_file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
