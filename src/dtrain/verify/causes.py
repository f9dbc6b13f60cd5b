"""From how a gradient, an update or a metric is wrong to the likely reason.

Works on recordings in fp64, where rounding is out of the way: a factor of 2 is 2 to 12 digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.job.spec import JobSpec
from dtrain.recording import Recording, StepRecord, Tensors, Vector
from dtrain.verify.compare import L1, Distance, Excess, apart, relative
from dtrain.verify.findings import (
    BUFFERS,
    CLIPPING,
    EVALUATION,
    GRADIENT,
    LOSS,
    SCALER,
    STATE,
    UPDATE,
    Finding,
)
from dtrain.verify.pairs import Pair

_CLIPPED = 1 - 1e-4
"""A clipped gradient is as long as the limit, but for torch's 1e-6 against a division by 0."""

_FACTOR = 1e-6
"""A gradient counts as a multiple of another when what is left over is this small beside it."""


@dataclass(frozen=True)
class Case:
    """A pair that differs from the reference, and where it first does."""

    reference: Recording
    other: Recording
    pair: Pair
    spec: JobSpec
    excess: Excess

    @property
    def step(self) -> int:
        """The first step that differs."""
        return self.excess.step

    @property
    def shown(self) -> Excess:
        """What differs, as people want to know it: of a loss, the gradients."""
        if self.excess.what not in ("loss", "gradient norm"):
            return self.excess
        ours, theirs = (each.steps[self.step].gradients for each in (self.reference, self.other))
        distance = Distance.between(ours, theirs)
        return Excess(self.step, "gradients", distance.tensor, distance.relative)

    def __str__(self) -> str:
        """`the gradients are off by 1.2e-02, most of it in first.weight`."""
        where = f", most of it in {self.shown.tensor}" if self.shown.tensor else ""
        return f"the {self.shown.what} are off by {self.shown.value:.1e}{where}"


def explain(case: Case) -> Finding:
    """The clause that fails, and the likely cause."""
    what = case.excess.what
    if what in ("loss", "gradient norm", "gradients"):
        return _gradient(case)
    if what == "parameters":
        return _update(case)
    return _buffers(case) if what == "buffers" else _evaluation(case)


def losses_differ(case: Case) -> bool:
    """Whether the losses of the step's samples do not add up to the same."""
    if case.excess.what not in ("loss", "gradient norm", "gradients"):
        return False
    return _apart_in_loss(case) > L1.parameters


def sum_for_mean(case: Case) -> Finding | None:
    """Whether `loss` returns a scalar that is a sum: then that, and no mean, is the same."""
    if not losses_differ(case):
        return None
    sums = []
    for recording in (case.reference, case.other):
        losses = [loss for line in recording.lines(case.step) for loss in line.losses]
        if any(weight is not None for _, weight in losses):
            return None
        sums.append(math.fsum(total for total, _ in losses))
    if relative(*sums) > L1.parameters:
        return None
    counts = [len(part) for line in case.other.lines(case.step) for part in line.ids]
    found = f"the scalars that loss() returns for {_few([float(n) for n in counts])} samples add "
    found += "up to the one for all of them"
    return _finding(case, found, "loss() returns a sum, not a mean: return Loss(sum, n)", LOSS)


def state_in_task(case: Case, names: Sequence[str]) -> Finding:
    """That attributes of the task are the matter.

    Args:
        case: the pair.
        names: of the attributes that change from step to step.
    """
    attributes = f"attribute{'s' if len(names) > 1 else ''} {_few(list(names))}"
    likely = f"state in the task: {attributes}. "
    if case.pair.resume_after is not None:
        likely += "Checkpoints hold it only if the task has state_dict() and load_state_dict()"
    else:
        likely += "It changes with every call of loss(), and other layouts make more or fewer "
        likely += "calls: change it once per step, as in a callback's step_ended"
    return _finding(
        case, f"all agrees when the task's {attributes} stay as they are", likely, STATE
    )


def generator_in_task(case: Case, names: Sequence[str]) -> Finding:
    """That the task draws from generators which it keeps itself.

    Args:
        case: the pair.
        names: of the attributes that hold them.
    """
    attributes = f"attribute{'s' if len(names) > 1 else ''} {_few(list(names))}"
    likely = "its numbers go by how often it was asked on this rank, and are the same on all "
    likely += "ranks; draw from torch's own generator, which dtrain seeds for each rank"
    return _finding(case, f"the task has a generator of its own: {attributes}", likely, STATE)


def loss_by_sample(case: Case, reference: Recording, other: Recording) -> Finding:
    """Which rank computes other losses, from recordings whose micro-batches are single samples."""
    right = {
        i: loss for each in _losses_of_samples(reference, case.step) for i, loss in each.items()
    }
    theirs = _losses_of_samples(other, case.step)
    wrong = [
        [i for i, loss in losses.items() if relative(right.get(i), loss) > L1.parameters]
        for losses in theirs
    ]
    ranks = [rank for rank, samples in enumerate(wrong) if samples]
    if not ranks:
        found = f"{_loss_text(case)}, though each alone is the same"
        likely = "loss() looks at the whole local batch, or returns a mean of something else than "
        likely += "samples (tokens, positives): then return Loss(sum, weight)"
        return _finding(case, found, likely, LOSS)
    sample = wrong[ranks[0]][0]
    found = f"the loss of sample {sample} is {theirs[ranks[0]][sample]:.6g} on rank {ranks[0]}, "
    found += f"not {right[sample]:.6g}"
    likely = "the model or loss() reads its rank or world size"
    if 0 not in ranks:
        likely += f", or something else is particular to rank{'s' if len(ranks) > 1 else ''} "
        likely += ", ".join(map(str, ranks))
    return _finding(case, found, likely, LOSS)


def _losses_of_samples(recording: Recording, step: int) -> list[dict[int, float]]:
    """For each rank the losses of its samples in a step, of micro-batches of one sample."""
    return [
        {ids[0]: total for ids, (total, _) in zip(line.ids, line.losses, strict=False)}
        for line in recording.lines(step)
    ]


def _apart_in_loss(case: Case) -> float:
    sums = _loss_sum(case.reference, case.step), _loss_sum(case.other, case.step)
    return 0.0 if None in sums else relative(*sums)


def _loss_text(case: Case) -> str:
    return f"the summed loss of the same samples differs by {_apart_in_loss(case):.1e} of itself"


def _gradient(case: Case) -> Finding:
    if losses_differ(case):
        likely = "the model reads its rank or world size, or looks at the whole local batch"
        return _finding(case, _loss_text(case), likely, LOSS)
    return (
        _by_factor(case)
        or _by_some_parameters(case)
        or _by_clipping(case)
        or _by_unequal_parts(case)
        or _finding(case, str(case), _unknown(case))
    )


def _unknown(case: Case) -> str:
    if case.pair.micro_batch_size is not None:
        return "accumulated gradients are reduced more than once, or divided by their number"
    return "the ranks' gradients are added with wrong weights"


def _by_clipping(case: Case) -> Finding | None:
    """A mean of clipped gradients is shorter than a clipped mean."""
    limit = case.spec.train.clip_grad_norm
    ours, theirs = (each.steps[case.step].gradients.norm() for each in (case.reference, case.other))
    if limit is None or ours < limit * _CLIPPED or theirs >= limit * _CLIPPED:
        return None
    found = f"the gradient, clipped to {limit:g}, has a norm of {theirs:.4g}"
    likely = "each rank clips its own gradient before the reduction"
    return _finding(case, found, likely, CLIPPING)


def _by_factor(case: Case) -> Finding | None:
    factor = _multiple(*_side_by_side(*_gradients(case)))
    if factor is None or abs(factor - 1) < _FACTOR:
        return None
    found = f"the gradient is {_number(factor)} times the reference's"
    clause, likely = _meaning(factor, case)
    return _finding(case, found, likely, clause)


def _meaning(factor: float, case: Case) -> tuple[str, str]:
    """(clause, likely cause) of a gradient that is a constant multiple of the right one."""
    parts, size = case.pair.parts, len(case.reference.ids(case.step))
    micro = max((len(line.ids) for line in case.other.lines(case.step)), default=1)
    weight = _weight(case.reference, case.step)
    known = [
        (parts, f"gradients are added over the {parts} processes and not divided"),
        (1 / parts, f"gradients are divided by the {parts} processes once more (wrapped twice?)"),
        (parts**2, f"gradients are multiplied by {parts} twice"),
        (micro, f"the {micro} accumulated micro-batches are added and not divided"),
        (1 / micro, f"gradients are divided by the {micro} micro-batches once more"),
        (size, "a sum over the samples is taken for a mean"),
        (1 / size, "a mean over the samples is divided by their number once more"),
        (weight / size, "gradients are divided by the number of samples instead of the weights"),
        (size / weight, "gradients are divided by the weights instead of the number of samples"),
    ]
    if factor >= 256 and math.log2(factor) % 1 == 0:
        return SCALER, f"the loss scale {factor:g} is never taken out again"
    for value, meaning in known:
        if value != 1 and abs(factor / value - 1) < _FACTOR:
            return GRADIENT, meaning
    return GRADIENT, "one division too many, too few, or by another number"


def _by_some_parameters(case: Case) -> Finding | None:
    """Only some tensors differ, the others not at all."""
    ours, theirs = _gradients(case)
    if ours.vectors.keys() ^ theirs.vectors.keys():
        strangers = sorted(ours.vectors.keys() ^ theirs.vectors.keys())
        found = f"{strangers[0]} has a gradient on one side only"
        return Finding(GRADIENT, found, "unused parameters are treated differently", case.step)
    bad = [name for name in ours.vectors if _is_apart(ours, theirs, name)]
    if not 0 < len(bad) < len(ours.vectors):
        return None
    found = f"{len(bad)} of {len(ours.vectors)} parameters have another gradient: {_few(bad)}"
    return _finding(case, found, "their gradients are not reduced, or reduced twice")


def _by_unequal_parts(case: Case) -> Finding | None:
    """Means that count alike although they are over unequal parts."""
    sizes = _weights_of_ranks(case.other, case.step)
    if sizes is None or len(set(sizes)) == 1 or case.pair.micro_batch_size is not None:
        return None
    likely = f"a mean of means: ranks hold weights of {_few(sizes)} but count alike"
    return _finding(case, str(case), likely)


def _update(case: Case) -> Finding:
    found = str(case)
    if case.pair.resume_after is not None and case.step == case.pair.resume_after + 1:
        likely = "the optimizer's state was not restored with the checkpoint"
        return _finding(case, found, likely, UPDATE)
    factor = _multiple(*(_moves(each, case.step) for each in (case.reference, case.other)))
    likely = "the optimizer's settings or state depend on the number of processes"
    if factor is not None and abs(factor - 1) > _FACTOR:
        likely = f"parameters move {_number(factor)} times as far from the same gradient: "
        likely += "updated more than once, or with another learning rate"
    return _finding(case, found, likely, UPDATE)


def _buffers(case: Case) -> Finding:
    name, step = case.excess.tensor, case.step
    before, after, theirs = (
        case.reference.steps[step - 1].buffers.vectors.get(name),
        case.reference.steps[step].buffers.vectors.get(name),
        case.other.steps[step].buffers.vectors.get(name),
    )
    likely = "each process updates it from its own samples"
    if before is not None and theirs is not None and after is not None:
        stale = before.shape == theirs.shape and not np.any(before - theirs)
        if stale and np.any(after - theirs):
            likely = "a stale copy of the buffer is put back after the step"
    return Finding(BUFFERS, f"buffer {name} has another value", likely, step, name)


def _evaluation(case: Case) -> Finding:
    name = case.excess.what.removeprefix("metric ")
    ours, theirs = case.reference.metrics.get(name), case.other.metrics.get(name)
    found = f"{name} is {theirs}, not {ours}, of the same parameters"
    likely = "samples are repeated or dropped to make shares equal, or ranks' means are averaged"
    return Finding(EVALUATION, found, likely, case.step)


# -- numbers ---------------------------------------------------------------------------------


def _finding(case: Case, found: str, likely: str, clause: str = GRADIENT) -> Finding:
    return Finding(clause, found, likely, case.step, case.shown.tensor)


def _gradients(case: Case) -> tuple[Tensors, Tensors]:
    """The reduced gradients of both sides, before clipping."""
    limit = case.spec.train.clip_grad_norm
    ours, theirs = (each.steps[case.step] for each in (case.reference, case.other))
    return _before_clipping(ours, limit), _before_clipping(theirs, limit)


def _before_clipping(record: StepRecord, limit: float | None) -> Tensors:
    """As torch's clip_grad_norm_ had them: it multiplies by limit / (norm + 1e-6) if below 1."""
    if limit is None or record.grad_norm is None:
        return record.gradients
    factor = max(1.0, (record.grad_norm + 1e-6) / limit)
    given = record.gradients
    return Tensors(
        {name: vector * factor for name, vector in given.vectors.items()},
        given.digests,
        {name: norm * factor for name, norm in given.norms.items()},
    )


def _side_by_side(ours: Tensors, theirs: Tensors) -> tuple[Vector, Vector]:
    names = [
        name
        for name, vector in ours.vectors.items()
        if name in theirs.vectors and vector.shape == theirs.vectors[name].shape
    ]
    empty: list[Vector] = [np.empty(0)]
    return (
        np.concatenate([*(ours.vectors[name] for name in names), *empty]),
        np.concatenate([*(theirs.vectors[name] for name in names), *empty]),
    )


def _moves(recording: Recording, step: int) -> Vector:
    before, after = recording.steps[step - 1].parameters, recording.steps[step].parameters
    old, new = _side_by_side(before, after)
    return new - old


def _multiple(ours: Vector, theirs: Vector) -> float | None:
    """The factor by which `theirs` is `ours`; None when it is no multiple."""
    size = float(ours @ ours)
    if ours.shape != theirs.shape or size == 0 or not np.all(np.isfinite(theirs)):
        return None
    factor = float(ours @ theirs) / size
    rest = apart(factor * ours, theirs)
    return factor if rest <= _FACTOR * abs(factor) * math.sqrt(size) else None


def _is_apart(ours: Tensors, theirs: Tensors, name: str) -> bool:
    difference = apart(ours.vectors[name], theirs.vectors[name])
    return difference > L1.parameters * ours.norm()


def _loss_sum(recording: Recording, step: int) -> float | None:
    """The sum over all samples of a step, as the task's loss gave it; None if it cannot be told."""
    sums = []
    for line in recording.lines(step):
        if all(weight is not None for _, weight in line.losses):
            sums += [total for total, _ in line.losses]
        elif len(line.losses) == len(line.ids):
            calls = zip(line.losses, line.ids, strict=True)
            sums += [mean * len(ids) for (mean, _), ids in calls]
        else:
            return None
    return math.fsum(sums)


def _weights_of_ranks(recording: Recording, step: int) -> list[float] | None:
    """Each rank's weight in a step: what the loss returned, or the number of samples."""
    weights = []
    for line in recording.lines(step):
        given = [weight for _, weight in line.losses]
        known = [weight for weight in given if weight is not None]
        if len(known) == len(given):
            weights.append(math.fsum(known))
        else:
            weights.append(float(sum(map(len, line.ids))))
    return weights or None


def _weight(recording: Recording, step: int) -> float:
    return math.fsum(_weights_of_ranks(recording, step) or []) or 1.0


def _number(value: float) -> str:
    return f"{value:.6g}"


def _few(items: list[str] | list[float], limit: int = 4) -> str:
    texts = [item if isinstance(item, str) else f"{item:.4g}" for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
