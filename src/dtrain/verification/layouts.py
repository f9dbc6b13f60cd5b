"""The compared layouts: each is a trainer, a strategy, a launcher and a number of processes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain import catalog
from dtrain.errors import PlanError
from dtrain.job.spec import TrainSpec

MIN_FORWARD_SAMPLES = 2
"""The fewest samples that BatchNorm needs in a forward pass. Most jobs give it many more."""
# Slurm's own commands try for minutes to reach a controller that does not run
_SINFO_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Layout:
    strategy: str
    procs: int = 1
    """Processes per node; for `dp`, replicas in the one process."""
    nodes: int = 1
    trainer: str = "native"
    launcher: str = "local"
    gpus: bool = False
    """True if each process has a GPU."""
    micro_batch_size: int | None = None
    """Samples per forward pass. None means as in the job."""
    workers: int | None = None
    """Loader processes per rank. None means as in the job."""
    resume_after: int | None = None
    """Stop after so many steps, and continue in a second attempt. None means one attempt."""
    own_loops: bool = False
    """True if Lightning's own loops train a LightningModule. Otherwise the job decides."""
    compiled: bool = False
    """True if torch.compile compiles the model."""
    overrides: tuple[str, ...] = ()
    """Further settings of the job, as `--set` takes them."""
    title: str | None = None
    """A name for people. None means a name made of the fields above."""

    @property
    def world_size(self) -> int:
        fact = catalog.STRATEGIES.get(self.strategy)
        return self.nodes * (1 if fact is not None and fact.one_process else self.procs)

    @property
    def parts(self) -> int:
        """The number of parts of a global batch: ranks, or replicas of `dp`."""
        return self.nodes * self.procs

    @property
    def is_exact(self) -> bool:
        """True if the same bits are promised on any number of processes."""
        return self.strategy == "exact"

    @property
    def repeats_bits(self) -> bool:
        """True if the same processes, started again or resumed, must have the same bits.

        On GPUs, atomics add in any order. Compiled code depends on the sizes of the batches that
        this process has seen.
        """
        return not self.gpus and not self.compiled

    @property
    def name(self) -> str:
        """A name for people: `ddp ×4`, `lightning ddp 2 nodes ×2 by slurm`."""
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
        words += ["compiled"] if self.compiled else []
        text = " ".join(words)
        if self.micro_batch_size is not None:
            text += f", micro {self.micro_batch_size}"
        if self.workers is not None:
            text += f", {self.workers} loaders"
        return text if self.resume_after is None else f"{text}, resumed"

    @property
    def twin(self) -> Layout:
        """The same processes, started in the simplest way. This layout must have the same bits."""
        return replace(self, launcher="local", nodes=1, procs=self.parts, resume_after=None)


REFERENCE = Layout("single")


def all_layouts(
    trainers: Sequence[str] = (),
    reference: Layout = REFERENCE,
    clusters: Sequence[str] = (),
) -> list[Layout]:
    """Return every layout that this machine can run in one attempt, except the reference.

    Args:
        trainers: use only these. Empty means every installed trainer.
        reference: the layout with which all are compared. Its trainer is tried in more ways.
        clusters: launchers whose cluster can be reached, see `reachable_clusters`.
    """
    layouts: list[Layout] = []
    for trainer, fact in catalog.TRAINERS.items():
        is_here = catalog.problem_of("trainer", trainer) is None
        if trainer in trainers or (not trainers and is_here):
            for strategy in fact.strategies:
                layout = Layout(strategy, trainer=trainer)
                layouts += _of_strategy(layout, whole=trainer == reference.trainer)
    for strategy in catalog.OWN_LOOPS if reference.trainer == "lightning" else ():
        layout = Layout(strategy, trainer="lightning", own_loops=True)
        layouts += _of_strategy(layout, whole=False)
    ddp = replace(reference, strategy="ddp", procs=2)
    if ddp in layouts:
        layouts += [replace(ddp, launcher=cluster) for cluster in clusters]
    return [layout for layout in layouts if layout != reference]


def _of_strategy(layout: Layout, *, whole: bool) -> Iterator[Layout]:
    strategy = layout.strategy
    if strategy == "single":
        yield layout
    elif strategy == "exact":
        yield layout
        yield replace(layout, procs=2)
        yield replace(layout, procs=4)
    elif strategy != "ddp" or not whole:
        yield replace(layout, procs=2)
    else:
        yield replace(layout, procs=2)
        yield replace(layout, procs=4)
        yield replace(layout, procs=2, nodes=2)
        yield replace(layout, procs=2, launcher="torchrun")


def reachable_clusters(environ: Mapping[str, str]) -> list[str]:
    """Return the launchers whose cluster is known here.

    For Slurm its commands must work, and for Ray its address must be set.
    """
    found = []
    if shutil.which("sinfo", path=environ.get("PATH")):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            argv = ["sinfo", "--noheader"]
            completed = subprocess.run(
                argv, env=dict(environ), capture_output=True, timeout=_SINFO_TIMEOUT_S, check=False
            )
            found += ["slurm"] if completed.returncode == 0 else []
    if environ.get("RAY_ADDRESS") and catalog.problem_of("launcher", "ray") is None:
        found.append("ray")
    return found


def with_extra_layouts(
    layouts: Sequence[Layout], train: TrainSpec, steps: int, reference: Layout = REFERENCE
) -> tuple[list[Layout], dict[Layout, str]]:
    """Return the layouts, and variants of the smallest one that find mistakes which others miss.

    Micro-batches and loader processes show what depends on the number of forward passes. A resume
    shows what a checkpoint lacks. `exact` shows by bits what tolerances hide.

    Returns:
        The layouts, each once; and the layouts that are left out, with the reason.
    """
    least = min(layouts, key=lambda layout: _simplicity(layout, reference))
    more = [accumulating(least, train)]
    if steps > 1:
        more.append(replace(least, resume_after=(steps + 1) // 2))
    exact = replace(least, strategy="exact")
    problem = _exact_problem(exact, train)
    if problem is None:
        more.append(exact)
    left_out = {} if problem is None or exact in layouts else {exact: problem}
    return list(dict.fromkeys([*layouts, *more])), left_out


def compiled_layouts(layouts: Sequence[Layout], reference: Layout = REFERENCE) -> list[Layout]:
    """Return the layouts of a job with `train.compile`. The reference is not compiled.

    The first one is the reference compiled. Those that cannot be compiled are as without.
    """
    return [
        replace(reference, compiled=True),
        *(
            layout
            if layout.own_loops or catalog.compile_problem(layout.strategy)
            else replace(layout, compiled=True)
            for layout in layouts
        ),
    ]


def _simplicity(layout: Layout, reference: Layout) -> tuple[object, ...]:
    """Return a sort key. The simplest layout of several processes has the least."""
    return (
        layout.parts == 1,
        layout.trainer != reference.trainer,
        layout.own_loops,
        layout.strategy != "ddp",
        layout.parts,
        layout.nodes,
        layout.launcher != REFERENCE.launcher,
    )


def _exact_problem(layout: Layout, train: TrainSpec) -> str | None:
    """Return why `exact` cannot run this way, as far as that is known now; None if it can."""
    if layout.gpus:
        return "on GPUs the same bits are not promised"
    return catalog.pair_problem(
        layout.trainer, layout.strategy, layout.nodes
    ) or catalog.shard_problem(layout.strategy, train.virtual_shards, [layout.world_size])


def accumulating(layout: Layout, train: TrainSpec) -> Layout:
    """Return the layout with about three unequal micro-batches a step, and two loader processes.

    If a process has four or more samples, no micro-batch has only one.
    """
    parts = train.virtual_shards if layout.is_exact else layout.parts
    least, most = train.global_batch_size // parts, -(-train.global_batch_size // parts)
    about = max(1, -(-most // 3))
    good = (
        size
        for shares in ((most, least, least - 1), (most, least))  # a short batch may have one less
        for size in range(max(MIN_FORWARD_SAMPLES, about), most)
        if all(last_chunk(share, size) >= MIN_FORWARD_SAMPLES for share in shares)
    )
    return replace(layout, micro_batch_size=next(good, about), workers=2)


def last_chunk(samples: int, size: int) -> int:
    """Return the size of the last piece, if `samples` are cut into pieces of `size`."""
    return samples % size or min(size, samples)


def requested_layouts(
    *,
    trainers: Sequence[str],
    strategies: Sequence[str],
    launchers: Sequence[str],
    nodes: Sequence[int],
    procs: Sequence[int],
    gpus: bool,
    reference: Layout = REFERENCE,
) -> list[Layout]:
    """Return every requested combination that is possible, except the reference.

    Raises:
        PlanError: none is possible, or something requested does not exist.
    """
    _check("trainer", trainers)
    _check("strategy", strategies)
    found: dict[Layout, None] = {}
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
                        layout = Layout(strategy, size, node_count, trainer, launcher, gpus)
                        found[layout] = None
                        if reference.trainer == "lightning" and strategy in catalog.OWN_LOOPS:
                            found[replace(layout, own_loops=True)] = None
    found.pop(replace(reference, gpus=gpus), None)
    if not found:
        raise PlanError(
            "; ".join(dict.fromkeys(problems))
            or "the reference is the only chosen layout, and cannot be compared with itself",
            code="verify.nothing-to-compare",
        )
    return list(found)


def _sizes(strategy: str, requested: Sequence[int]) -> Sequence[int]:
    if strategy == "single":
        return (1,)
    return requested or ((2,) if strategy == "dp" else (2, 4))


def _check(kind: str, names: Iterable[str]) -> None:
    for name in names:
        catalog.find(kind, name)
