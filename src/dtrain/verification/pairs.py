"""What is compared: one trainer, one strategy, one launcher and a number of processes each."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain import catalog
from dtrain.errors import PlanError
from dtrain.job.spec import TrainSpec

ENOUGH = 2
"""Samples that BatchNorm wants at least in a forward pass; most jobs give it many more."""
_ANSWER_S = 10.0  # Slurm's own commands try for minutes to reach a controller that is gone


@dataclass(frozen=True)
class Pair:
    strategy: str
    procs: int = 1
    """Processes per node; for `dp`, replicas in the one process."""
    nodes: int = 1
    trainer: str = "native"
    launcher: str = "local"
    gpus: bool = False
    """Whether each process has a GPU."""
    micro_batch_size: int | None = None
    """Samples per forward pass; None: as in the job."""
    workers: int | None = None
    """Loader processes per rank; None: as in the job."""
    resume_after: int | None = None
    """Stop after so many steps and go on in a second attempt; None: in one go."""
    own_loops: bool = False
    """Whether a LightningModule is trained by Lightning's own loops; else as the job says."""
    overrides: tuple[str, ...] = ()
    """Further settings of the job, as `--set` takes them."""
    title: str | None = None
    """What people call it; None: made of the above."""

    @property
    def world_size(self) -> int:
        fact = catalog.STRATEGIES.get(self.strategy)
        return self.nodes * (1 if fact is not None and fact.one_process else self.procs)

    @property
    def parts(self) -> int:
        """Into how many parts a global batch is cut: ranks, or replicas of `dp`."""
        return self.nodes * self.procs

    @property
    def is_exact(self) -> bool:
        """Whether the same bits are promised on any number of processes."""
        return self.strategy == "exact"

    @property
    def name(self) -> str:
        """For people: `ddp ×4`, `lightning ddp 2 nodes ×2 by slurm`."""
        if self.title is not None:
            return self.title
        words = [] if self.trainer == "native" else [self.trainer]
        words += ["own loops"] if self.own_loops else []
        words.append(self.strategy)
        if self.nodes > 1:
            words.append(f"{self.nodes} nodes")
        if self.parts > 1:
            words.append(f"×{self.procs}")
        if self.gpus:
            words.append("GPU")
        if self.launcher != "local":
            words.append(f"by {self.launcher}")
        text = " ".join(words)
        if self.micro_batch_size is not None:
            text += f", micro {self.micro_batch_size}"
        if self.workers is not None:
            text += f", {self.workers} loaders"
        return text if self.resume_after is None else f"{text}, resumed"

    @property
    def twin(self) -> Pair:
        """The same processes started in the plainest way: what must agree with this bit for bit."""
        return replace(self, launcher="local", nodes=1, procs=self.parts, resume_after=None)


REFERENCE = Pair("single")


def all_pairs(
    trainers: Sequence[str] = (),
    reference: Pair = REFERENCE,
    clusters: Sequence[str] = (),
) -> list[Pair]:
    """Everything that this machine can run in one go, besides the reference.

    Args:
        trainers: only these; empty: every trainer that is installed.
        reference: what all are compared with; its trainer is tried in more ways than others.
        clusters: launchers whose cluster can be reached, see `clusters_here`.
    """
    pairs: list[Pair] = []
    for trainer, fact in catalog.TRAINERS.items():
        is_here = catalog.problem_of("trainer", trainer) is None
        if trainer in trainers or (not trainers and is_here):
            for strategy in fact.strategies:
                pair = Pair(strategy, trainer=trainer)
                pairs += _of_strategy(pair, whole=trainer == reference.trainer)
    for strategy in catalog.OWN_LOOPS if reference.trainer == "lightning" else ():
        pair = Pair(strategy, trainer="lightning", own_loops=True)
        pairs += _of_strategy(pair, whole=False)
    ddp = replace(reference, strategy="ddp", procs=2)
    if ddp in pairs:
        pairs += [replace(ddp, launcher=cluster) for cluster in clusters]
    return [pair for pair in pairs if pair != reference]


def _of_strategy(pair: Pair, *, whole: bool) -> Iterator[Pair]:
    strategy = pair.strategy
    if strategy == "single":
        yield pair
    elif strategy == "exact":
        yield pair
        yield replace(pair, procs=2)
        yield replace(pair, procs=4)
    elif strategy != "ddp" or not whole:
        yield replace(pair, procs=2)
    else:
        yield replace(pair, procs=2)
        yield replace(pair, procs=4)
        yield replace(pair, procs=2, nodes=2)
        yield replace(pair, procs=2, launcher="torchrun")


def clusters_here(environ: Mapping[str, str]) -> list[str]:
    """The launchers whose cluster is known here: Slurm's commands answer, Ray's address is set."""
    found = []
    if shutil.which("sinfo", path=environ.get("PATH")):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            asked = ["sinfo", "--noheader"]
            told = subprocess.run(
                asked, env=dict(environ), capture_output=True, timeout=_ANSWER_S, check=False
            )
            found += ["slurm"] if told.returncode == 0 else []
    if environ.get("RAY_ADDRESS") and catalog.problem_of("launcher", "ray") is None:
        found.append("ray")
    return found


def with_more(
    pairs: Sequence[Pair], train: TrainSpec, steps: int, reference: Pair = REFERENCE
) -> tuple[list[Pair], dict[Pair, str]]:
    """The pairs and what finds mistakes that they miss, of the fewest processes among them.

    Micro-batches and loader processes show what depends on the number of forward passes, a resume
    what no checkpoint has, and `exact` shows by bits what tolerances hide.

    Returns:
        The pairs, each once; and those that are left out, with the reason.
    """
    least = min(pairs, key=lambda pair: _plainness(pair, reference))
    more = [accumulating(least, train)]
    if steps > 1:
        more.append(replace(least, resume_after=(steps + 1) // 2))
    exact = replace(least, strategy="exact")
    problem = _exact_problem(exact, train)
    if problem is None:
        more.append(exact)
    left_out = {} if problem is None or exact in pairs else {exact: problem}
    return list(dict.fromkeys([*pairs, *more])), left_out


def _plainness(pair: Pair, reference: Pair) -> tuple[object, ...]:
    """The least is the plainest pair of several processes."""
    return (
        pair.parts == 1,
        pair.trainer != reference.trainer,
        pair.own_loops,
        pair.strategy != "ddp",
        pair.parts,
        pair.nodes,
        pair.launcher != REFERENCE.launcher,
    )


def _exact_problem(pair: Pair, train: TrainSpec) -> str | None:
    """Why `exact` cannot run so, as far as that is known beforehand; None when it may."""
    if pair.gpus:
        return "on GPUs bits are not promised"
    return catalog.pair_problem(pair.trainer, pair.strategy, pair.nodes) or catalog.shard_problem(
        pair.strategy, train.virtual_shards, [pair.world_size]
    )


def accumulating(pair: Pair, train: TrainSpec) -> Pair:
    """The pair with about three unequal micro-batches a step, read by two loader processes.

    None of them has one sample alone, where a process has four or more.
    """
    parts = train.virtual_shards if pair.is_exact else pair.parts
    least, most = train.global_batch_size // parts, -(-train.global_batch_size // parts)
    about = max(1, -(-most // 3))
    good = (
        size
        for shares in ((most, least, least - 1), (most, least))  # a short batch may have one less
        for size in range(max(ENOUGH, about), most)
        if all(last_piece(share, size) >= ENOUGH for share in shares)
    )
    return replace(pair, micro_batch_size=next(good, about), workers=2)


def last_piece(samples: int, size: int) -> int:
    """How many samples are in the last piece, when so many are cut into pieces of `size`."""
    return samples % size or min(size, samples)


def chosen(
    *,
    trainers: Sequence[str],
    strategies: Sequence[str],
    launchers: Sequence[str],
    nodes: Sequence[int],
    procs: Sequence[int],
    gpus: bool,
    reference: Pair = REFERENCE,
) -> list[Pair]:
    """Every combination of what was asked for that can be, besides the reference.

    Raises:
        PlanError: none can be, or something asked for does not exist; says why.
    """
    _check("trainer", trainers)
    _check("strategy", strategies)
    found: dict[Pair, None] = {}
    problems: list[str] = []
    for trainer in trainers or (reference.trainer,):
        for strategy in strategies or catalog.TRAINERS[trainer].strategies:
            for node_count in nodes or (1,):
                problem = catalog.pair_problem(trainer, strategy, node_count)
                if problem is not None:
                    problems.append(problem)
                    continue
                for size in _sizes(strategy, procs):
                    for launcher in launchers or ("local",):
                        pair = Pair(strategy, size, node_count, trainer, launcher, gpus)
                        found[pair] = None
                        if reference.trainer == "lightning" and strategy in catalog.OWN_LOOPS:
                            found[replace(pair, own_loops=True)] = None
    found.pop(replace(reference, gpus=gpus), None)
    if not found:
        raise PlanError(
            "; ".join(dict.fromkeys(problems)) or "nothing to compare with itself",
            code="verify.nothing-to-compare",
        )
    return list(found)


def _sizes(strategy: str, asked: Sequence[int]) -> Sequence[int]:
    if strategy == "single":
        return (1,)
    return asked or ((2,) if strategy == "dp" else (2, 4))


def _check(kind: str, names: Iterable[str]) -> None:
    for name in names:
        catalog.find(kind, name)
