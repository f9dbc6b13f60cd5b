"""Explains why the losses of the same samples differ: because of a sum, state, a rank or a batch.

Some explanations need another run of both layouts, which the caller makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dtrain.trace import Recording
from dtrain.verification.case import Case
from dtrain.verification.compare import L1, relative
from dtrain.verification.rules import LOSS, STATE, Finding
from dtrain.words import few, numbered


def losses_differ(case: Case) -> bool:
    """Return whether the losses of the step's samples have different sums."""
    if case.excess.what not in ("loss", "gradient norm", "gradients"):
        return False
    return _loss_difference(case) > L1.parameters


def sum_for_mean(case: Case) -> Finding | None:
    """Return a finding if `loss` returns a scalar that is a sum.

    In that case the sums of these scalars agree, but their means do not.
    """
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
    observation = (
        f"the scalars that loss() returns for {few(counts)} samples add up to the scalar for all "
        "of them"
    )
    return case.finding(observation, "loss() returns a sum, not a mean: return Loss(sum, n)", LOSS)


def state_in_task(case: Case, names: Sequence[str]) -> Finding:
    """Return the finding that attributes of the task that change in training are the cause."""
    attributes = numbered("attribute", names)
    cause = f"state in the task: {attributes}. "
    if case.layout.resume_after is not None:
        cause += "A checkpoint contains it only if the task has state_dict() and load_state_dict()"
    else:
        cause += "It changes with every call of loss(), and the number of calls depends on the "
        cause += "layout: change it once per step, for example in on_step of a dtrain.Callback"
    observation = f"with constant values of the task's {attributes}, there is no difference"
    return case.finding(observation, cause, STATE)


def generator_in_task(case: Case, names: Sequence[str]) -> Finding:
    """Return the finding that the task draws from its own generators, kept in these attributes."""
    cause = "its numbers depend on how often this rank drew from it, and are the same on all "
    cause += "ranks: draw from torch's default generator, which dtrain seeds for each rank"
    observation = f"the task has a generator of its own: {numbered('attribute', names)}"
    return case.finding(observation, cause, STATE)


def loss_by_sample(case: Case, reference: Recording, other: Recording) -> Finding:
    """Name the rank whose losses differ, from recordings with micro-batches of one sample."""
    right = {
        i: loss for each in _losses_of_samples(reference, case.step) for i, loss in each.items()
    }
    actual = _losses_of_samples(other, case.step)
    wrong = [
        [i for i, loss in losses.items() if relative(right.get(i), loss) > L1.parameters]
        for losses in actual
    ]
    ranks = [rank for rank, samples in enumerate(wrong) if samples]
    if not ranks:
        observation = f"{_loss_text(case)}, but the loss of each single sample is the same"
        cause = "loss() uses the whole local batch, or returns a mean of something other than "
        cause += "samples (tokens, positives): in that case return Loss(sum, weight)"
        return case.finding(observation, cause, LOSS)
    sample = wrong[ranks[0]][0]
    observation = (
        f"the loss of sample {sample} is {actual[ranks[0]][sample]:.6g} on rank {ranks[0]}, not "
        f"{right[sample]:.6g}"
    )
    cause = "the model or loss() uses the rank or the world size"
    if 0 not in ranks:
        cause += f", or something else is different on {numbered('rank', ranks)}"
    return case.finding(observation, cause, LOSS)


def unknown(case: Case) -> Finding:
    """Return the finding for a cause that no further run can identify."""
    cause = "the model or loss() uses the rank, the world size, or the whole local batch"
    return case.finding(_loss_text(case), cause, LOSS)


def _losses_of_samples(recording: Recording, step: int) -> list[dict[int, float]]:
    """Return for each rank the losses of its samples in a step, of micro-batches of one sample."""
    return [
        {ids[0]: total for ids, (total, _) in zip(line.ids, line.losses, strict=False)}
        for line in recording.lines(step)
    ]


def _loss_difference(case: Case) -> float:
    sums = _loss_sum(case.reference, case.step), _loss_sum(case.other, case.step)
    return 0.0 if None in sums else relative(*sums)


def _loss_text(case: Case) -> str:
    return f"the relative difference of the summed loss is {_loss_difference(case):.1e}"


def _loss_sum(recording: Recording, step: int) -> float | None:
    """Return the sum of the task's losses over all samples of a step; None if it is unknown."""
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
