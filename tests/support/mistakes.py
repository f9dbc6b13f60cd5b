"""Catalogues of mistakes: what of a training each changes, and what `verify` is to say of it.

The tests make each of them; docs/same-training.md lists them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dtrain.verification.layouts import Layout
from dtrain.verification.rules import (
    BATCH_NORM,
    BUFFERS,
    CLIPPING,
    DATA,
    EVALUATION,
    GRADIENT,
    LOSS,
    RANDOM,
    REPLICAS,
    SCALER,
    SCHEDULE,
    START,
    STATE,
    UPDATE,
)
from support import JOBS

DDP = Layout("ddp", procs=2)
DDP3 = Layout("ddp", procs=3)
MICRO = replace(DDP, micro_batch_size=2)
RESUMED = replace(DDP, resume_after=3)
EXACT = Layout("exact", procs=2)


@dataclass(frozen=True)
class Bug:
    """A bug and a part of its finding."""

    module: str
    rule: str
    likely: str
    """A part of the likely cause."""
    step: int = 1
    layout: Layout = DDP
    job: tuple[str, ...] = field(default=())
    level: str | None = "L0"
    what: str = ""
    """In a sentence, where no module says it."""

    @property
    def id(self) -> str:
        """For pytest."""
        return self.module or self.job[0].partition("=")[0].rpartition(".")[2]

    @property
    def sentence(self) -> str:
        """What it does."""
        return _of_module(self.module) if self.module else self.what


UNWEIGHTED = ("args.weighted=false",)
FP16 = ("train.precision=fp16", "train.clip_grad_norm=null", "args.scale=0.001")

BUGS = [
    Bug("mean_of_means", GRADIENT, "mean of means"),
    Bug("mean_of_means", GRADIENT, "mean of means: ranks have the weights 3, 2", 3, job=UNWEIGHTED),
    Bug("sum_not_mean", GRADIENT, "summed over the 2 processes and not divided"),
    Bug("averaged_twice", GRADIENT, "divided by the 2 processes twice (is the model wrapped"),
    Bug("reduced_twice_in_part", GRADIENT, "are reduced twice"),
    Bug("weights_ignored", GRADIENT, "number of samples instead of the sum of weights"),
    Bug("missing_no_sync", GRADIENT, "accumulated gradients are reduced more than once",
        layout=replace(DDP, micro_batch_size=2)),
    Bug("never_reduced", REPLICAS, "gradients are not reduced"),
    Bug("clipped_before_reduction", CLIPPING, "clips its own gradient"),
    Bug("scheduler_per_rank", SCHEDULE, "once per process (2)", 2),
    Bug("rate_times_world", SCHEDULE, "multiplied by the number of processes, 2"),
    Bug("update_per_micro_batch", UPDATE, "2.9 times as much for the same gradient"),
    Bug("padded", DATA, "padded to equal length", 3, level=None),
    Bug("dropped", DATA, "the remaining samples are dropped", 3, level=None),
    Bug("not_shared_out", DATA, "not split between the ranks", level=None),
    Bug("dealt_in_turn", DATA, "different order", level=None),
    Bug("forgotten_epoch", DATA, "set_epoch() is not called", 4, level=None),
    Bug("seed_by_rank", DATA, "each rank makes the order", level=None),
    Bug("wrong_resume", DATA, "wrong position", 3, layout=replace(DDP, resume_after=2), level=None),
    Bug("momentum_lost", UPDATE, "optimizer's state was not restored", 4, layout=RESUMED),
    Bug("schedule_lost", SCHEDULE, "scheduler's state was not restored", 4, layout=RESUMED),
    Bug("scale_left_in", SCALER, "not divided by the loss scale, 65536",
        job=FP16),
    Bug("seeded_by_rank", START, "a seed that depends on the rank", 0),
    Bug("same_random_numbers", RANDOM, "same seed", job=("args.dropout=0.3",)),
    Bug("reads_its_rank", LOSS, "uses the rank"),
    Bug("", BATCH_NORM, "BatchNorm (norm) normalises over each process's own samples",
        job=("args.norm=true",), what="The model has a BatchNorm."),
    Bug("stale_buffer", BUFFERS, "stale copy"),
    Bug("unsynced_buffers", BUFFERS, "not synchronised", job=("args.tracks=true",)),
    Bug("", BUFFERS, "from its own samples", job=("args.tracks=true",),
        what="A buffer follows the mean of the samples that its process sees."),
    Bug("padded_evaluation", EVALUATION, "repeated or dropped", 5),
]  # fmt: skip
"""Each a module in tests/jobs/bugs, which changes how a training is done."""


@dataclass(frozen=True)
class Mistake:
    """A mistake, the layout that shows it, and a part of its finding."""

    name: str
    rule: str
    text: str
    """A part of the observation or of the likely cause."""
    layout: Layout = DDP
    step: int = 1

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.name}, {self.layout.name}"

    @property
    def sentence(self) -> str:
        """What it does."""
        return _of_class(self.name)


MISTAKES = [
    Mistake("StaleSample", DATA, "different data on rank 1"),
    Mistake("StaleSample", DATA, "its [0] differs", DDP3),
    Mistake("PrivateGenerator", DATA, "a generator of its own", RESUMED),
    Mistake("PrivateGenerator", DATA, "a generator of its own"),
    Mistake("PrivateGenerator", DATA, "a generator of its own", EXACT),
    Mistake("SumForMean", LOSS, "a sum, not a mean: return Loss(sum, n)"),
    Mistake("SumForMean", LOSS, "a sum, not a mean: return Loss(sum, n)", MICRO),
    Mistake("MeanOfPositives", LOSS, "a mean of something other than samples"),
    Mistake("InBatch", LOSS, "uses the whole local batch"),
    Mistake("BranchesOnRank", LOSS, "on rank 1"),
    Mistake("ReadsWorldSize", LOSS, "uses the rank or the world size"),
    Mistake("StepsInLoss", SCHEDULE, "stepped in loss()", MICRO),
    Mistake("Updates", UPDATE, "the optimizer is stepped"),
    Mistake("Counts", STATE, "attribute calls", RESUMED, 4),
    Mistake("Counts", STATE, "changes with every call of loss()", MICRO),
    Mistake("Counts", STATE, "attribute calls", EXACT),
    Mistake("Averages", STATE, "attribute ema", RESUMED, 5),
    Mistake("Averages", STATE, "attribute ema", MICRO, 5),
    Mistake("Teacher", STATE, "attribute ema", RESUMED, 4),
    Mistake("OwnNoise", STATE, "a generator of its own: attribute noise"),
    Mistake("OwnRate", SCHEDULE, "of group 1 is 0.004 on rank 1, not 0.003", DDP3, 3),
    Mistake("WritesWeights", REPLICAS, "writes to the parameters"),
    Mistake("ScaledGradient", GRADIENT, "2.weight"),
    Mistake("OwnStart", START, "rank 1 differs from the others", DDP3, 0),
    Mistake("Evaluated", EVALUATION, "", step=5),
]
"""Each a class in tests/jobs/mistakes, and how it is launched to be seen."""

REFUSED = [
    Mistake("StaleFile", "", "train_dataset() differs on rank 1", DDP3),
    Mistake("StaleFile", "", "element [0][2] is"),
    Mistake("ShardsItself", "", "data.stream: sharded"),
    Mistake("ShufflesByRank", "", "train_dataset()", DDP3),
    Mistake("SkipsOne", "", "rank 1", DDP3),
    Mistake("OrderByRank", "", "order of samples differs"),
    Mistake("OwnDecay", "", "weight_decay of group 0 is 0.1 on rank 1"),
    Mistake("FreezesByRank", "", "rank 1"),
    Mistake("WrapsItself", "", "already wrapped in DistributedDataParallel"),
]
"""Those that the launch itself refuses, in its own words."""

LAUNCH = "a launch refuses these before the first step, without verify"


def listed() -> Iterator[tuple[str, list[str]]]:
    """Each rule, and the mistakes that break it, a sentence each."""
    found: dict[str, dict[str, None]] = {}
    for bug in BUGS:
        found.setdefault(bug.rule, {})[bug.sentence] = None
    for rule, some in ((None, MISTAKES), (LAUNCH, REFUSED)):
        for mistake in some:
            found.setdefault(rule or mistake.rule, {})[mistake.sentence] = None
    for rule, sentences in found.items():
        yield rule, list(sentences)


def _first_line(documented: ast.Module | ast.ClassDef) -> str:
    return " ".join((ast.get_docstring(documented) or "").partition("\n\n")[0].split())


def _of_module(name: str) -> str:
    return _first_line(ast.parse((JOBS / "bugs" / f"{name}.py").read_text()))


def _of_class(name: str) -> str:
    module = ast.parse((JOBS / "mistakes" / "mistakes.py").read_text())
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return next(_first_line(node) for node in classes if node.name == name)
