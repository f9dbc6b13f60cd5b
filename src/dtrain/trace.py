"""The record of each step of a training, written by its workers for `dtrain verify` to compare.

A recording is a directory of the run directory. Rank 0 writes `step-00000003.npz` after step 3
(gradients as the optimizer received them, parameters and buffers after it), and
`step-00000000.npz` before the first. Every rank writes one line per step to `rank-00001.jsonl`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.plainjson import numbers
from dtrain.run import files, rundir

VARIABLE = "DTRAIN_RECORD"
"""The variable of workers that record. It contains a `TraceOptions` as JSON."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class TraceOptions:
    """The ways in which a recorded run differs from the job; by default none."""

    fp64: bool = False
    """True puts model, data and arithmetic in double precision."""
    own_noise: bool = True
    """False turns dropout off, and makes the random numbers of `loss` and `evaluate` depend on the
    sample, not on the process that computes it.
    """
    by_sample: bool = False
    """True makes every micro-batch one sample."""
    frozen: tuple[str, ...] = ()
    """Attributes of the task that stay as they were before the first step."""
    batch_norm: bool = True
    """False makes BatchNorm normalise by its running statistics, which stay as they are."""
    max_train_samples: int | None = None
    """The number of first samples to train on, so that an epoch ends within the run."""
    max_eval_samples: int | None = None
    """The number of first samples to evaluate on."""

    def to_env(self) -> dict[str, str]:
        """Return the variable that requests these options from a worker."""
        return {VARIABLE: json.dumps(asdict(self))}

    def beyond(self, usual: TraceOptions) -> str:
        """Return the difference from the usual options, for people: `again in fp64`; or empty."""
        labels = {
            "fp64": "in fp64", "own_noise": "with fixed noise", "by_sample": "sample by sample",
            "batch_norm": "with frozen BatchNorm", "frozen": "with constant task attributes",
        }  # fmt: skip
        own, other = asdict(self), asdict(usual)
        changes = [text for name, text in labels.items() if own[name] != other[name]]
        return "" if self == usual else " ".join(["again", ", ".join(changes)]).rstrip()

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> TraceOptions | None:
        """Return the options in the environment; None if it requests no recording."""
        text = environ.get(VARIABLE)
        if not text:
            return None
        options = json.loads(text)
        return cls(**{**options, "frozen": tuple(options.get("frozen", ()))})


@dataclass(frozen=True)
class Tensors:
    """Named tensors at one moment, each as a digest and a vector that keeps norms and angles.

    Small tensors are stored in full. A larger one is stored as a count sketch (Charikar, Chen,
    Farach-Colton, 2002): each element is added, with a random sign, to one of some thousand
    buckets. A sketch is linear, so the sketch of a difference is the difference of the sketches,
    and norms are preserved within a few per cent.
    """

    vectors: dict[str, Vector] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """The digests by name, which are equal exactly if type, shape and every bit are."""
    norms: dict[str, float] = field(default_factory=dict)
    """The 2-norms by name, of the tensor itself, not of its sketch."""

    def joined(self) -> Vector:
        return np.concatenate([*self.vectors.values(), np.empty(0)])

    def norm(self) -> float:
        return math.hypot(*self.norms.values())


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as rank 0 saw it. Step 0 is the state before the first step."""

    step: int
    """The number of steps done, including this one."""
    loss: float | None
    """The loss as the trainer reports it."""
    grad_norm: float | None
    """The norm of the reduced gradient before clipping; None without clipping."""
    gradients: Tensors
    """The gradients as the optimizer received them; empty if it was not stepped."""
    parameters: Tensors
    """The parameters after the step."""
    buffers: Tensors
    """The buffers after the step."""
    facts: dict[str, Any] = field(default_factory=dict)
    """`batch_norm` has the names of such modules. From step 1 on, `num_samples` has the samples of
    an epoch, unless the data are a stream.
    """

    def write(self, folder: Path) -> None:
        tensors = {"gradients": self.gradients, "parameters": self.parameters}
        tensors["buffers"] = self.buffers
        plain = ("step", "loss", "grad_norm", "facts")
        meta = {
            **{name: getattr(self, name) for name in plain},
            "lengths": {k: {n: len(v) for n, v in t.vectors.items()} for k, t in tensors.items()},
            "digests": {kind: each.digests for kind, each in tensors.items()},
            "norms": {kind: each.norms for kind, each in tensors.items()},
        }
        packed = io.BytesIO()
        np.savez(
            packed,
            meta=np.array(json.dumps(meta)),
            gradients=self.gradients.joined(),
            parameters=self.parameters.joined(),
            buffers=self.buffers.joined(),
        )
        files.write_atomic(folder / _step_file(self.step), packed.getvalue())

    @classmethod
    def read(cls, path: Path) -> StepRecord:
        with np.load(path, allow_pickle=False) as packed:
            meta = json.loads(str(packed["meta"]))
            lengths, digests, norms = (meta.pop(key) for key in ("lengths", "digests", "norms"))
            gradients, parameters, buffers = (
                Tensors(_split(packed[kind], lengths[kind]), digests[kind], norms[kind])
                for kind in ("gradients", "parameters", "buffers")
            )
        return cls(gradients=gradients, parameters=parameters, buffers=buffers, **meta)


@dataclass(frozen=True)
class RankLine:
    """One optimizer step, as one rank saw it."""

    step: int
    epoch: int
    ids: list[list[int]]
    """The sample ids of each micro-batch that the rank fetched, in order."""
    contents: list[list[dict[str, str]]]
    """For each micro-batch and sample, the digest of each leaf; empty if unknown."""
    losses: list[tuple[float, float | None]]
    """(sum, weight) of each call of the task's loss; a plain scalar has weight None."""
    stepped: int
    """The number of optimizer steps: 1, or 0 if fp16 skipped it."""
    parameters: str | None
    """The digest of this rank's parameters after the step; None if it holds only a part."""
    buffers: dict[str, str]
    """The digest of each of this rank's buffers after the step."""
    lr: list[float]
    """The rate of each parameter group in this step, in this rank's optimizer."""
    gradients: str | None
    """The digest of the gradients that this rank's optimizer received; None if they are parts."""
    state: dict[str, str]
    """The type and digest of each attribute of the task, after the step."""
    draws: list[str]
    """Lines that drew random numbers in `loss`, for example `randn_like at task.py:12`. They are
    recorded only without `TraceOptions.own_noise`.
    """
    random: str
    """The digest of the state of the rank's random generators after the step."""
    drew: bool
    """True if random numbers were drawn during the step."""


@dataclass(frozen=True)
class Recording:
    steps: dict[int, StepRecord]
    """The steps by number; 0 is the state before the first."""
    ranks: dict[int, dict[int, list[RankLine]]]
    """step → rank → its lines. There are several if several attempts did the step."""
    metrics: dict[str, float]
    """The metrics of the evaluation at the end."""

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    def complete(self, world_size: int) -> Recording:
        """Return only the steps that every rank has recorded, for a run that was cut short."""
        steps = {
            step: record
            for step, record in self.steps.items()
            if len(self.ranks.get(step, {})) == world_size
        }
        return Recording(steps, {step: self.ranks[step] for step in steps}, self.metrics)

    def lines(self, step: int) -> list[RankLine]:
        """Return every rank's newest line of a step, in rank order."""
        return [lines[-1] for _, lines in sorted(self.ranks.get(step, {}).items())]

    def draws(self) -> list[str]:
        """Return the lines that drew random numbers in `loss`, on any rank in any step."""
        lines = [line for step in self.ranks for line in self.lines(step)]
        return sorted({draw for line in lines for draw in line.draws})

    def changing_state(self) -> dict[str, str]:
        """Return the task's attributes that some step changed on some rank, with their types."""
        first = self.lines(0)
        return {
            name: value.split()[0]
            for step in self.steps
            for before, after in zip(first, self.lines(step), strict=False)
            for name, value in before.state.items()
            if after.state.get(name) != value
        }

    def contents(self, step: int) -> list[dict[int, dict[str, str]]]:
        """Return for each rank the contents of the samples that it read in a step, by id."""
        return [
            {
                sample: content
                for ids, contents in zip(line.ids, line.contents, strict=True)
                for sample, content in zip(ids, contents, strict=False)
            }
            for line in self.lines(step)
        ]

    def ids(self, step: int) -> list[int]:
        """Return the ordered global batch of a step: the parts of the ranks in rank order."""
        return [i for line in self.lines(step) for part in line.ids for i in part]


class Writer:
    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._lines = folder / f"rank-{rank:05d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def step(self, record: StepRecord) -> None:
        record.write(self._folder)

    def line(self, line: RankLine) -> None:
        files.append_line(self._lines, asdict(line))


def read(run: rundir.RunDir) -> Recording:
    """Read the recording of a run. It has no steps if the run recorded nothing."""
    folder = run.recording
    records = [StepRecord.read(path) for path in sorted(folder.glob("step-*.npz"))]
    ranks: dict[int, dict[int, list[RankLine]]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        for raw in files.read_lines(path):
            line = RankLine(
                **{**raw, "losses": [(math.nan if s is None else s, w) for s, w in raw["losses"]]}
            )
            ranks.setdefault(line.step, {}).setdefault(rank, []).append(line)
    evaluations = [line for line in files.read_lines(run.metrics) if line["split"] == "eval"]
    other = ("time", "step", "epoch", "split")
    last = evaluations[-1] if evaluations else {}
    metrics = {name: value for name, value in last.items() if name not in other}
    return Recording({r.step: r for r in records}, ranks, numbers(metrics))


def _step_file(step: int) -> str:
    return f"step-{step:08d}.npz"


def _split(values: Vector, lengths: dict[str, int]) -> dict[str, Vector]:
    ends = np.cumsum(list(lengths.values()))
    return dict(zip(lengths, np.split(values, ends[:-1]), strict=True)) if lengths else {}
