"""The order of an epoch: time to its first batch, memory, and cost of an index.

dtrain beside torch's DistributedSampler, for one rank of eight with batches of 256, in turns
(A B A B …) and every measurement in a process of its own; then dtrain alone where the other
would need 40 GB and more. Prints the least disturbed of all rounds and ratios, in Markdown::

    python benchmarks/sampler.py --rounds 3

Memory is the growth of the peak of the resident set from before the sampler is made to the last
index taken. The cost of an index is CPU time, which a busy machine stretches less than time: that
of the first batch shared out over the rank's epoch, and that of the following million indices, as
lists of ints in batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WORLD_SIZE = 8
BATCH = 256
INDICES = 1_000_000
"""Indices taken at most; an epoch of 1e6 has 125,000 for each rank."""

BOTH = (10**6, 10**7, 10**8)
ALONE = (10**9, 10**12)

Numbers = dict[str, float]


# -- in a process of its own -------------------------------------------------------------------


def measure(name: str, n: int) -> Numbers:
    """Seconds to the first batch, memory in MB, CPU nanoseconds per index."""
    make = {"dtrain": dtrain_batches, "torch": torch_batches}[name]
    make(1000)  # imports and first calls are not the sampler's
    before = peak_mb()
    started, cpu_started = time.perf_counter(), time.process_time()
    batches = make(n)
    assert len(next(batches)) == BATCH
    first, set_up = time.perf_counter() - started, time.process_time() - cpu_started
    cpu_started = time.process_time()
    taken = sum(len(batch) for batch in itertools.islice(batches, INDICES // BATCH))
    cpu = time.process_time() - cpu_started
    return {
        "first_s": first,
        "memory_mb": peak_mb() - before,
        "index_ns": 1e9 * (set_up / (n / WORLD_SIZE) + cpu / taken),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dtrain_batches(n: int) -> Iterator[list[int]]:
    """A rank's batches as the trainer gets them."""
    from dtrain.train.data.loader import train_requests
    from dtrain.train.data.order import shuffled
    from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position

    def split(batch: GlobalBatch) -> tuple[range, ...]:
        return batch.micro_batches(0, WORLD_SIZE, None)

    batches = EpochPlan(n, WORLD_SIZE * BATCH, 1, None).batches(0, Position())
    requests = train_requests(batches, shuffled(n, seed=1), split)
    return (request.samples.tolist() for request in requests)


def torch_batches(n: int) -> Iterator[list[int]]:
    """The same with DistributedSampler and BatchSampler."""
    from torch.utils.data import BatchSampler, DistributedSampler

    class Sized:
        def __len__(self) -> int:
            return n

    sampler = DistributedSampler(Sized(), num_replicas=WORLD_SIZE, rank=0, seed=1)  # type: ignore[arg-type]
    sampler.set_epoch(1)
    return iter(BatchSampler(sampler, BATCH, drop_last=False))


# -- the table ---------------------------------------------------------------------------------


def run(name: str, n: int) -> Numbers:
    command = [sys.executable, __file__, "--measure", name, str(n)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    numbers: Numbers = json.loads(done.stdout)
    return numbers


def best(names: tuple[str, ...], n: int, rounds: int) -> dict[str, Numbers]:
    found: dict[str, list[Numbers]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(run(name, n))
    return {
        name: {key: min(each[key] for each in many) for key in many[0]}
        for name, many in found.items()
    }


def row(n: int, found: dict[str, Numbers]) -> str:
    ours, theirs = found["dtrain"], found.get("torch")
    cells = [f"1e{len(str(n)) - 1}"]
    for key, unit, scale in (
        ("first_s", "ms", 1e3), ("memory_mb", "MB", 1), ("index_ns", "ns", 1),
    ):  # fmt: skip
        cells.append(f"{ours[key] * scale:,.1f} {unit}")
        if theirs is None:
            cells += ["", ""]
        else:
            ratio = theirs[key] / max(ours[key], 1e-9)
            rounded = float(f"{ratio:.2g}")
            cells += [f"{theirs[key] * scale:,.1f} {unit}", f"{rounded:,g} ×"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=float, default=1e8, help="largest N for torch")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], int(given.measure[1]))))
        return
    parts = ("first batch", "memory", "CPU per index")
    heads = [f"{part}: dtrain | DistributedSampler | ratio" for part in parts]
    print(f"| samples | {' | '.join(heads)} |")
    print("| ---: " * 10 + "|")
    for n in BOTH:
        names = ("dtrain", "torch") if n <= given.largest else ("dtrain",)
        print(row(n, best(names, n, given.rounds)), flush=True)
    for n in ALONE:
        print(row(n, best(("dtrain",), n, given.rounds)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    main()
