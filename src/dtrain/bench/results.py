"""What `dtrain bench` measures, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from dtrain.run.phases import OWN, PHASES, Phase, read_phases, straggler
from dtrain.run.rundir import RunDir

SLOW_LINK = 0.5
"""A link below this part of the median rate is slow."""
_LEAST_LINKS = 6
"""With two nodes there are two links, and the median says nothing."""
FASTER_LOADER, MUCH_DATA = 1.3, 0.1
"""How many times as fast another number of workers must be, and the share of a step that waiting
for data must have, before something is advised."""
_AS_FAST = 0.9
"""Of the numbers of workers that reach this part of the best rate, the smallest is advised."""
MUCH_REDUCTION, MUCH_OTHER = 0.25, 0.25
_LEAST_STEPS, LEAST_S = 20, 2.0


@dataclass(frozen=True)
class Collective:
    """The time of a collective. `bytes` is the size of nccl-tests: of the larger of its sides."""

    operation: str
    bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """The algorithm bandwidth."""
        return self.bytes / self.seconds

    def bus_bytes_per_s(self, ranks: int) -> float:
        """Return the bus bandwidth, as nccl-tests defines it.

        It is comparable between operations and numbers of ranks, and with the rate of a link.
        """
        return self.bytes_per_s * bus_factor(self.operation, ranks)


def bus_factor(operation: str, ranks: int) -> float:
    """Return the bytes that a link must carry, for each byte of the message."""
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return 1.0 if operation == "broadcast" else (ranks - 1) / ranks


@dataclass(frozen=True)
class Link:
    """From one node to another, by their numbers."""

    source: int
    target: int
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Store:
    """The store of the process group: the time of a set and of a get, while all ranks make them."""

    set_s: float
    get_s: float


@dataclass(frozen=True)
class LoaderRate:
    workers: int
    samples_per_s: float
    """Of all ranks together, while nothing is trained."""


@dataclass(frozen=True)
class Measured:
    """What the launched program writes to `RunDir.bench`."""

    nodes: list[str]
    ranks: int
    device: str
    copy_bytes_per_s: float | None = None
    collectives: list[Collective] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    store: Store | None = None
    loader: list[LoaderRate] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What a step consists of, in the mean over the ranks."""

    steps: int
    seconds: float
    """The time of all these steps, without evaluations and checkpoints."""
    shares: dict[Phase, float]
    straggler: tuple[int, float] | None = None
    """The slowest rank, and how many times the median its own phases take."""


@dataclass(frozen=True)
class Bench:
    """The results of all parts."""

    runs: list[str]
    """The runs that were made."""
    measured: Measured | None = None
    step: Step | None = None
    workers: int | None = None
    """The job's `data.workers`."""
    problems: dict[str, str] = field(default_factory=dict)
    """The parts that could not be measured, each with the reason."""


def slow_links(links: list[Link]) -> list[tuple[Link, float]]:
    """Return the links that are much slower than the others, each with its part of the median."""
    if len(links) < _LEAST_LINKS:
        return []
    usual = median(link.bytes_per_s for link in links)
    found = [(link, link.bytes_per_s / usual) for link in links]
    return sorted((each for each in found if each[1] < SLOW_LINK), key=lambda each: each[1])


def read_step(run: RunDir) -> Step | None:
    """Return what the steps of a run consisted of, without the first ones, which are slower.

    They are in the first record of a rank, of about a second. None if there are no records.
    """
    seconds: dict[int, dict[str, float]] = {}
    steps: dict[int, int] = {}
    first: set[int] = set()
    for rank, line in read_phases(run, 0):
        if rank in seconds and rank not in first:  # only its first record, until now
            seconds[rank], steps[rank] = {}, 0
            first.add(rank)
        own = seconds.setdefault(rank, {})
        for phase, spent in line["phases"].items():
            own[phase] = own.get(phase, 0.0) + spent
        steps[rank] = steps.get(rank, 0) + line["steps"]
    if not seconds or not max(steps.values()):
        return None
    wanted = [phase for phase in PHASES if phase not in ("evaluation", "checkpoint")]
    total = sum(own.get(phase, 0.0) for own in seconds.values() for phase in wanted)
    shares = {
        phase: sum(own.get(phase, 0.0) for own in seconds.values()) / max(total, 1e-9)
        for phase in wanted
    }
    slowest = {
        rank: sum(own.get(phase, 0.0) for phase in OWN) / max(steps[rank], 1)
        for rank, own in seconds.items()
    }
    return Step(max(steps.values()), total / len(seconds), shares, straggler(slowest))


def advice(bench: Bench) -> list[str]:
    """Return what to change, as far as the results support it."""
    found = []
    if bench.measured is not None:
        names = bench.measured.nodes
        found += [
            f"the link from {names[link.source]} to {names[link.target]} is {1 - part:.0%} below "
            "the median rate: look at its cable, port and driver, or leave out the node"
            for link, part in slow_links(bench.measured.links)
        ]
    step = bench.step
    if step is not None and (step.steps < _LEAST_STEPS or step.seconds < LEAST_S):
        found.append(
            f"after the first second, {step.steps} steps took {step.seconds:.1f} s: too few to "
            "judge. Use --steps with a larger number"
        )
        step = None
    shares: Mapping[Phase, float] = {} if step is None else step.shares
    found += _of_data(bench, shares.get("data"))
    if step is not None:
        found += _of_step(step)
    return found


def _of_data(bench: Bench, waits: float | None) -> list[str]:
    """Return what to change about reading data. `waits` is its share of a step, if it is known."""
    rates = {} if bench.measured is None else _rates(bench.measured.loader)
    if waits is not None and waits < MUCH_DATA:
        return []
    share = "" if waits is None else f"{waits:.0%} of a step is waiting for data; "
    now = bench.workers
    if now in rates:
        best = max(rates.values())
        workers = min(each for each, rate in rates.items() if rate >= _AS_FAST * best)
        if rates[workers] >= FASTER_LOADER * rates[now]:
            times = rates[workers] / rates[now]
            return [
                f"{share}the loader with {workers} workers is {times:.1f} times as fast as with "
                f"{now}: set data.workers={workers}"
            ]
    if waits is None:
        return []
    other = "; no number of workers is much faster" if rates else ""
    return [f"{share}read from a faster disk, or do less for each sample{other}"]


def _rates(loader: list[LoaderRate]) -> dict[int, float]:
    return {each.workers: each.samples_per_s for each in loader}


def _of_step(step: Step) -> list[str]:
    found = []
    if step.straggler is not None:
        rank, ratio = step.straggler
        found.append(
            f"rank {rank} takes {ratio:.1f} times as long as the median for its own part of a "
            "step, and the others wait for it: look at its node"
        )
    reduction = step.shares.get("reduction", 0.0)
    if reduction >= MUCH_REDUCTION and step.straggler is None:
        found.append(
            f"{reduction:.0%} of a step is waiting for the reduction of gradients, and no rank is "
            "slower than the others: use fewer processes, or a faster network between them"
        )
    other = step.shares.get("other", 0.0)
    if other >= MUCH_OTHER:
        found.append(
            f"{other:.0%} of a step is between its phases: callbacks, checks and metrics. Look at "
            "the callbacks, and set larger checks.every_steps and log.every_steps"
        )
    return found
