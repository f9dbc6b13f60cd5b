"""Explains why the losses of the same samples differ: by a sum, by state, by a rank, by a batch.

Some explanations need another run of both sides, which the caller makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dtrain.trace import Recording
from dtrain.verification.case import Case
from dtrain.verification.clauses import LOSS, STATE, Finding
from dtrain.verification.compare import L1, relative
from dtrain.words import few, numbered


def losses_differ(case: Case) -> bool:
    """Return whether the losses of the step's samples have different sums."""
    if case.excess.what not in ("loss", "gradient norm", "gradients"):
        return False
    return _apart_in_loss(case) > L1.parameters


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
    found = f"the scalars that loss() returns for {few(counts)} samples add "
    found += "up to the one for all of them"
    return case.finding(found, "loss() returns a sum, not a mean: return Loss(sum, n)", LOSS)


def state_in_task(case: Case, names: Sequence[str]) -> Finding:
    """Return the finding that attributes of the task that change in training are the cause."""
    attributes = numbered("attribute", names)
    likely = f"state in the task: {attributes}. "
    if case.pair.resume_after is not None:
        likely += "Checkpoints hold it only if the task has state_dict() and load_state_dict()"
    else:
        likely += "It changes with every call of loss(), and other layouts make more or fewer "
        likely += "calls: change it once per step, as in on_step of a dtrain.Callback"
    return case.finding(f"all agrees when the task's {attributes} stay as they are", likely, STATE)


def generator_in_task(case: Case, names: Sequence[str]) -> Finding:
    """Return the finding that the task draws from its own generators, kept in these attributes."""
    likely = "its numbers go by how often it was asked on this rank, and are the same on all "
    likely += "ranks; draw from torch's own generator, which dtrain seeds for each rank"
    found = f"the task has a generator of its own: {numbered('attribute', names)}"
    return case.finding(found, likely, STATE)


def loss_by_sample(case: Case, reference: Recording, other: Recording) -> Finding:
    """Name the rank with other losses, from recordings with micro-batches of one sample."""
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
        return case.finding(found, likely, LOSS)
    sample = wrong[ranks[0]][0]
    found = f"the loss of sample {sample} is {theirs[ranks[0]][sample]:.6g} on rank {ranks[0]}, "
    found += f"not {right[sample]:.6g}"
    likely = "the model or loss() reads its rank or world size"
    if 0 not in ranks:
        likely += f", or something else is particular to {numbered('rank', ranks)}"
    return case.finding(found, likely, LOSS)


def unknown(case: Case) -> Finding:
    """Return the finding for a cause that no further run can identify."""
    likely = "the model reads its rank or world size, or looks at the whole local batch"
    return case.finding(_loss_text(case), likely, LOSS)


def _losses_of_samples(recording: Recording, step: int) -> list[dict[int, float]]:
    """Return for each rank the losses of its samples in a step, of micro-batches of one sample."""
    return [
        {ids[0]: total for ids, (total, _) in zip(line.ids, line.losses, strict=False)}
        for line in recording.lines(step)
    ]


def _apart_in_loss(case: Case) -> float:
    sums = _loss_sum(case.reference, case.step), _loss_sum(case.other, case.step)
    return 0.0 if None in sums else relative(*sums)


def _loss_text(case: Case) -> str:
    return f"the summed loss of the same samples differs by {_apart_in_loss(case):.1e} of itself"


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
