"""What it costs to know that the replicas are still one model.

One training step of an MLP with 12 M parameters under DDP, and in turns after it: the ledger's
comparison, a broadcast of every parameter from rank 0 with a comparison, and SHA-1 of every
parameter with a gather; and what is done in every step: digests of four samples of a stream, and a
look at all gradients, whether they are finite.
Prints each as a share of the step when done every k steps, in Markdown::

    python benchmarks/checks.py --ranks 2

All in the same processes, in one run; medians. `--every` is the default of `checks.every_steps`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from dtrain.job.spec import ChecksSpec
from dtrain.testing import run_ranks
from dtrain.train.checks.replicas import KINDS, Ledger
from dtrain.train.checks.spoilt import all_finite
from dtrain.train.checks.train_state import TrainState
from dtrain.train.data.content import digest, hash_of

WIDTH, DEPTH, BATCH = 1024, 11, 64


def model() -> nn.Sequential:
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def broadcast(module: nn.Module) -> bool:
    """Every parameter from rank 0, and a comparison."""
    same = True
    for parameter in module.parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, src=0)
        same = same and torch.equal(other, parameter)
    return same


def sha1(module: nn.Module) -> bool:
    """SHA-1 of every parameter, and a gather of all digests."""
    mine = [hashlib.sha1(p.detach().numpy()).hexdigest() for p in module.parameters()]
    everyone: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return all(each == mine for each in everyone)


def measure(rounds: int) -> dict[str, float]:
    """Medians in seconds on this rank, by name."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = model()
    wrapped = nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    ledger = Ledger(TrainState(plain, (optimizer,)))
    x, y = torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))

    def step() -> bool:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        return True

    samples = list(zip(x, y, strict=True))[:4]

    def content() -> bool:
        return hash_of({index: digest(sample) for index, sample in enumerate(samples)}) > 0

    ways: dict[str, Callable[[], bool]] = {
        "step": step,
        "content": content,
        "finite": lambda: all_finite(p.grad for p in plain.parameters() if p.grad is not None),
        "ledger": lambda: not ledger.differing(ledger.words()),
        "broadcast": lambda: broadcast(plain),
        "sha1": lambda: sha1(plain),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            assert way(), name
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=ChecksSpec().every_steps)
    options = parser.parse_args()
    ranks = run_ranks(measure, options.ranks, options.rounds, timeout=600)
    slowest = {name: max(each[name] for each in ranks) for name in ranks[0]}
    size = sum(parameter.numel() for parameter in model().parameters())
    print(
        f"{size / 1e6:.1f} M parameters, {options.ranks} ranks, {options.rounds} rounds, load "
        f"{os.getloadavg()[0]:.1f}; a step takes {1e3 * slowest['step']:.0f} ms; the ledger "
        f"exchanges {2 * 8 * len(KINDS)} bytes\n"
    )
    print(
        f"| check | one comparison | share of the time, one in {options.every} steps |\n"
        "| --- | --- | --- |"
    )
    for name, text in (
        ("ledger", "dtrain: parameters, gradients, optimizer state, buffers, numbers"),
        ("broadcast", "broadcast of all parameters, compared"),
        ("sha1", "SHA-1 of each parameter, gathered"),
    ):
        share = slowest[name] / options.every / slowest["step"]
        print(f"| {text} | {1e3 * slowest[name]:.1f} ms | {100 * share:.2f} % |")
    for name, text in (
        ("content", "dtrain: of a stream, four samples in every step"),
        ("finite", "dtrain: all gradients are numbers, in every step without clipping"),
    ):
        share = slowest[name] / slowest["step"]
        print(f"| {text} | {1e3 * slowest[name]:.2f} ms | {100 * share:.2f} % |")


if __name__ == "__main__":
    main()
