"""`python -m dtrain.train.bench ORDER`: measure what a training has on the nodes of a launch.

`dtrain bench` launches it as the module of a job. ORDER is JSON: `device` (`cpu` or `cuda`), the
`parts` to measure, and for the loader a `job`. Rank 0 writes `RunDir.bench`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run import files
from dtrain.run.failures import node_name
from dtrain.run.rundir import RUN_VARIABLE, RunDir
from dtrain.train import collectives
from dtrain.train.context import TrainContext
from dtrain.train.data.placement import Position
from dtrain.train.load import load_task
from dtrain.train.loop.build import train_feed

_SIZES = {"cpu": (1 << 10, 1 << 16, 1 << 20, 1 << 24), "cuda": (1 << 10, 1 << 18, 1 << 22, 1 << 28)}
"""The bytes of the messages."""
_COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_LINK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}
_BATCH_S = 0.05
_TRIES = 3
"""Each time is the shortest of three, because other programs can only make it longer."""
_ROUND_TRIPS = 20
_LINKS_AGAIN, _DOUBTFUL = 3, 0.7
"""How often a link is measured again that has less than this part of the median rate."""
_STORE_CALLS = 200
_LOADER_S, _FIRST_STEPS = 1.5, 5


def main() -> None:
    """Measure, and write the results."""
    order = json.loads(sys.argv[1])
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has new names for two collectives
    ranks = RankInfo.from_env()
    is_cuda = order["device"] == "cuda"
    device = torch.device("cuda", ranks.local_rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if is_cuda else "gloo", device_id=device if is_cuda else None
    )
    run = RunDir(os.environ[RUN_VARIABLE])
    measured = dict(_measured(order, ranks, device, run))
    if ranks.is_rank_zero:
        files.write_json(run.bench, measured)
    dist.barrier()
    dist.destroy_process_group()


def _measured(
    order: dict[str, Any], ranks: RankInfo, device: torch.device, run: RunDir
) -> Iterator[tuple[str, Any]]:
    """Yield each result by name. All ranks make all measurements together."""
    parts = order["parts"]
    places = collectives.gather_to_all([ranks.node_rank, node_name()])
    leaders = {node: places.index([node, name]) for node, name in sorted(places)}
    yield "nodes", [places[rank][1] for rank in leaders.values()]
    yield "ranks", ranks.world_size
    yield "device", torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if "collectives" in parts:
        yield "copy_bytes_per_s", _copy_rate(device)
        if ranks.world_size > 1:
            yield "collectives", list(_collectives(device))
    if "links" in parts and len(leaders) > 1:
        yield "links", _links(list(leaders.values()), ranks.rank, device)
    if "store" in parts:
        yield "store", _store(ranks)
    if "loader" in parts:
        yield "loader", list(_loader(order["job"], ranks, device, run))


# -- collectives ---------------------------------------------------------------------------------


def _copy_rate(device: torch.device) -> float:
    """Return the bytes per second that the slowest rank copies, while the others do the same."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return int(source.numel()) / _seconds(lambda: target.copy_(source), device)


def _collectives(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the time of each operation with each size. The size is that of nccl-tests."""
    world = dist.get_world_size()
    for size in _SIZES[device.type]:
        part = torch.ones(max(1, size // 4 // world), device=device)
        whole = torch.ones(world * part.numel(), device=device)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
            "broadcast": partial(dist.broadcast, whole, 0),
        }
        for operation, call in calls.items():
            seconds = _seconds(call, device)
            yield {"operation": operation, "bytes": 4 * whole.numel(), "seconds": seconds}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes on the slowest rank. All ranks call it."""
    call()
    once = _lasted(call, 1, device)
    count = collectives.from_zero(max(3, min(200, int(_BATCH_S / max(once, 1e-9)))))
    own = min(_lasted(call, count, device) for _ in range(_TRIES))
    return max(collectives.gather_to_all(own))


def _lasted(call: Callable[[], Any], count: int, device: torch.device) -> float:
    _synchronize(device)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - began) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- links ---------------------------------------------------------------------------------------


def _links(leaders: list[int], rank: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the latency and the rate from each node to each other, between their first ranks.

    In each round every node is in one pair, so that a network card has one link at a time. A link
    that seems slow is measured again, while the others are idle, and its best values count.
    """
    found: dict[tuple[int, int], tuple[float, float]] = {}
    wanted: list[list[tuple[int, int]]] = list(rounds(len(leaders)))
    for _ in range(1 + _LINKS_AGAIN):
        for pairs in wanted:
            for ends in [*pairs, *((b, a) for a, b in pairs)]:
                own = leaders[ends[0]], leaders[ends[1]]
                if rank in own:
                    latency, rate = _link(*own, rank, device)
                    before = found.get(ends, (latency, rate))
                    found[ends] = min(latency, before[0]), max(rate, before[1])
            dist.barrier()
        sent: list[list[Any]] = [
            [*ends, *found[ends]] for ends in found if leaders[ends[0]] == rank
        ]
        everyone = [link for each in collectives.gather_to_all(sent) for link in each]
        usual = median(rate for *_, rate in everyone)
        wanted = [[(a, b)] for a, b, _, rate in everyone if rate < _DOUBTFUL * usual]
    names = ("source", "target", "latency_s", "bytes_per_s")
    return [dict(zip(names, link, strict=True)) for link in everyone]


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of pairs, in which each of `count` members meets each other one once."""
    size = count + count % 2  # an odd number has one that waits
    ring = list(range(size))
    for _ in range(size - 1):
        pairs = zip(ring[: size // 2], reversed(ring[size // 2 :]), strict=True)
        yield [(a, b) for a, b in pairs if max(a, b) < count]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def _link(sender: int, receiver: int, rank: int, device: torch.device) -> tuple[float, float]:
    """Send from one rank to another. Return seconds of a short message, and bytes per second."""
    short = torch.zeros(8, dtype=torch.uint8, device=device)
    large = torch.zeros(_LINK_BYTES[device.type], dtype=torch.uint8, device=device)
    trips, sends = [], []
    for _ in range(_TRIES):
        trips.append(_exchange(short, _ROUND_TRIPS, sender, receiver, rank, device) / 2)
        sends.append(_exchange(large, 4, sender, receiver, rank, device, short))
    return min(trips), large.numel() / max(min(sends) - min(trips), 1e-9)


def _exchange(
    message: torch.Tensor,
    count: int,
    sender: int,
    receiver: int,
    rank: int,
    device: torch.device,
    answer: torch.Tensor | None = None,
) -> float:
    """Return the seconds of a message and its answer, by default the same message."""
    answer = message if answer is None else answer
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        if rank == sender:
            dist.send(message, receiver)
            dist.recv(answer, receiver)
        else:
            dist.recv(message, sender)
            dist.send(answer, sender)
    _synchronize(device)
    return (time.perf_counter() - began) / count


# -- store and loader ----------------------------------------------------------------------------


def _store(ranks: RankInfo) -> dict[str, float]:
    """Return the time of a set and of a get, while all ranks make them."""
    store, value = _get_default_store(), "x" * 64
    dist.barrier()
    began = time.perf_counter()
    for index in range(_STORE_CALLS):
        store.set(f"bench/{ranks.rank}/{index}", value)
    store.get(f"bench/{ranks.rank}/{_STORE_CALLS - 1}")  # a set does not wait for the store
    middle = time.perf_counter()
    for index in range(_STORE_CALLS):
        store.get(f"bench/{ranks.rank}/{index}")
    ended = time.perf_counter()
    sets, gets = zip(*collectives.gather_to_all([middle - began, ended - middle]), strict=True)
    return {"set_s": median(sets) / _STORE_CALLS, "get_s": median(gets) / _STORE_CALLS}


def _loader(
    job: dict[str, Any], ranks: RankInfo, device: torch.device, run: RunDir
) -> Iterator[dict[str, Any]]:
    """Yield the samples per second of all ranks together, by loader processes of each rank."""
    spec = JobSpec.model_validate(job)
    folder = sys.path[0]  # that of the job, where a module is looked for first
    task = load_task(spec.task, spec.args, folder, spec.trainer, spec.seed)
    cores = len(os.sched_getaffinity(0)) // ranks.local_world_size
    counts = [0, *(1 << power for power in range(6) if 1 << power <= max(1, cores))]
    for workers in sorted({*collectives.from_zero(counts), spec.data.workers}):
        data = spec.data.model_copy(update={"workers": workers})
        own = spec.model_copy(update={"data": data})
        rate = _loader_rate(TrainContext(own, run, ranks, 0, task, device))
        total = sum(collectives.gather_to_all(rate))
        yield {"workers": workers, "samples_per_s": total}


def _loader_rate(context: TrainContext) -> float:
    """Return the samples per second of this rank.

    All ranks read the same number of steps, because a feed may compare them at the end of an epoch.
    """
    feed, ranks, train = train_feed(context), context.ranks, context.spec.train
    size = train.micro_batch_size
    try:
        steps = feed.batches(
            0, Position(), lambda each: each.micro_batches(ranks.rank, ranks.world_size, size)
        )

        def read(count: int) -> tuple[int, float]:
            began = time.perf_counter()
            taken = islice(steps, count)
            samples = sum(each for _, batches, _ in taken for each, _ in batches)
            return samples, time.perf_counter() - began

        read(1)  # it starts the loader processes
        _, seconds = read(_FIRST_STEPS)
        samples, seconds = read(
            collectives.from_zero(max(_FIRST_STEPS, int(_FIRST_STEPS * _LOADER_S / seconds)))
        )
        return samples / seconds
    finally:
        feed.close()


if __name__ == "__main__":
    main()
