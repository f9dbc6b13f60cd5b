"""Differences that no tolerance allows: names, samples, learning rates, updates, replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dtrain.trace import Recording
from dtrain.verification import samples
from dtrain.verification.layouts import Layout
from dtrain.verification.rules import (
    BUFFERS,
    ENDED_EARLY,
    MODEL,
    RANDOM,
    REPLICAS,
    SCHEDULE,
    START,
    UPDATE,
    Finding,
)
from dtrain.words import numbered


def exact_findings(reference: Recording, other: Recording, layout: Layout) -> Iterator[Finding]:
    """Yield findings that need no tolerance: names, samples, learning rates, updates, replicas.

    They come step by step, so that the first finding is the earliest.
    """
    yield from _names(reference, other)
    yield from _start(reference, other)
    for step in range(1, reference.last_step + 1):
        if step not in other.steps:
            yield Finding(UPDATE, ENDED_EARLY, "", step)
            return
        yield from samples.of_order(reference, other, layout, step)
        yield from samples.of_contents(reference, other, layout, step)
        yield from _schedule(reference, other, layout, step)
        yield from _updates(reference, other, step)
        yield from _replicas(other, step)
        if not layout.is_exact:  # it seeds each shard, in any process
            yield from _random(other, step)


def _names(reference: Recording, other: Recording) -> Iterator[Finding]:
    expected = set(reference.steps[0].parameters.vectors)
    actual = set(other.steps[0].parameters.vectors)
    if expected == actual:
        return
    unmatched = sorted(expected ^ actual)
    yield Finding(
        MODEL,
        f"the names of parameters differ: {', '.join(unmatched[:3])}",
        "model() builds a different model in several processes",
        0,
        unmatched[0],
    )


def _start(reference: Recording, other: Recording) -> Iterator[Finding]:
    expected, actual = (each.steps[0].parameters.digests for each in (reference, other))
    different = [name for name in expected if name in actual and expected[name] != actual[name]]
    if different:
        yield Finding(
            START,
            f"{len(different)} of {len(expected)} parameters have different initial values",
            "model() sets a seed that depends on the rank or world size, or has its own generator",
            0,
            different[0],
        )
        return
    digests = [line.parameters for line in other.lines(0)]
    if any(each != digests[0] for each in digests):
        yield Finding(
            START,
            f"{_differing(digests)} in initial values",
            "model() sets a seed that depends on the rank; the strategy hides this by copying "
            "rank 0's values to all ranks",
            0,
        )


def _schedule(
    reference: Recording, other: Recording, layout: Layout, step: int
) -> Iterator[Finding]:
    expected = reference.lines(step)[0].lr
    lines = [(rank, line.lr) for rank, line in enumerate(other.lines(step)) if line.lr]
    wrong = [(rank, actual) for rank, actual in lines if expected and actual != expected]
    if not wrong:
        return
    _, actual = wrong[0]
    group = next((g for g, (x, y) in enumerate(zip(expected, actual, strict=False)) if x != y), 0)
    of_group = f" of group {group}" if len(expected) > 1 else ""
    those = numbered("rank", (rank for rank, _ in wrong))
    where = "" if len(wrong) == len(lines) else f" on {those}"
    observation = (
        f"the learning rate{of_group} is {actual[group]:.6g}{where}, not {expected[group]:.6g}"
    )
    if where:
        cause = f"something changes it on {those} only"
    else:
        cause = _explain_schedule(reference, other, group, layout, step)
    yield Finding(SCHEDULE, observation, cause, step)


def _explain_schedule(
    reference: Recording, other: Recording, group: int, layout: Layout, step: int
) -> str:
    rate = other.lines(step)[0].lr[group]
    known = {s: reference.lines(s)[0].lr for s in reference.steps}
    rates = {s: each[group] for s, each in known.items() if each}
    ratio = rate / rates[step] if rates.get(step) else 0.0
    if step == 1 and abs(ratio - layout.parts) < 1e-9:
        return f"it is multiplied by the number of processes, {layout.parts} (linear scaling)"
    if layout.resume_after is not None and step == layout.resume_after + 1:
        return "the scheduler's state was not restored from the checkpoint"
    calls = _calls(other, step)
    same_calls = next((s for s in rates if s != step and _calls(reference, s) == calls), None)
    if same_calls is not None and rates[same_calls] == rate:
        return "the scheduler is stepped in loss(), once for each of its calls"
    matches = [s for s, each in rates.items() if abs(each - rate) <= 1e-12 * abs(rate)]
    if any(s == 1 + (step - 1) * layout.parts for s in matches) or _runs_ahead(rates, rate, step):
        return (
            f"the scheduler is stepped once per process ({layout.parts}) instead of once per step"
        )
    if matches and max(matches) < step:
        return "the scheduler is not stepped after every step"
    return "the schedule depends on the number of processes"


def _calls(recording: Recording, step: int) -> int:
    """Return the number of calls of `loss` up to the end of a step, by the rank with the most."""
    steps = range(1, step + 1)
    return sum(max(len(line.losses) for line in recording.lines(s)) for s in steps)


def _runs_ahead(rates: dict[int, float], rate: float, step: int) -> bool:
    """Return whether a rate is one that the schedule reaches only later."""
    change = rates[step] - rates.get(step - 1, rates[step])
    return change != 0 and (rate - rates[step]) / change >= 0.9


def _updates(reference: Recording, other: Recording, step: int) -> Iterator[Finding]:
    expected = max((line.stepped for line in reference.lines(step)), default=1)
    counts = [line.stepped for line in other.lines(step)]
    if all(count == expected for count in counts):
        return
    if len(set(counts)) > 1:
        cause = "each rank decides alone whether to skip an fp16 step whose gradient overflows"
        yield Finding(UPDATE, f"the ranks made different numbers of updates: {counts}", cause, step)
        return
    cause = "the optimizer is stepped once per micro-batch or per process"
    if counts[0] == 0:
        cause = "the fp16 loss scale is wrong or lost: the gradient overflows"
    elif expected == 0:
        cause = "an fp16 step that overflows is not skipped"
    observation = f"the optimizer was stepped {counts[0]} times, not {expected}"
    yield Finding(UPDATE, observation, cause, step)


def _replicas(other: Recording, step: int) -> Iterator[Finding]:
    lines = other.lines(step)
    if any(line.parameters != lines[0].parameters for line in lines):
        same_gradients = len({line.gradients for line in lines}) == 1
        yield Finding(
            REPLICAS,
            f"{_differing([line.parameters for line in lines])} in parameters",
            "all ranks have the same gradient, but not the same update: the settings of their "
            "optimizers differ, or something writes to the parameters"
            if same_gradients
            else "gradients are not reduced: every rank trains on its own",
            step,
        )
    for name, digest in lines[0].buffers.items():
        if any(line.buffers.get(name) != digest for line in lines):
            yield Finding(
                BUFFERS,
                f"{_differing([line.buffers.get(name) for line in lines])} in buffer {name}",
                "buffers are not synchronised",
                step,
                name,
            )
            return


def _random(other: Recording, step: int) -> Iterator[Finding]:
    lines = other.lines(step)
    if len(lines) < 2 or not all(line.drew for line in lines):
        return
    if len({line.random for line in lines}) == 1:
        yield Finding(
            RANDOM,
            "all ranks drew the same random numbers",
            "all ranks have the same seed, so their dropout masks are the same",
            step,
        )


def _differing(digests: Sequence[str | None]) -> str:
    """Return which ranks differ from the majority. Without a majority, no rank is named."""
    counts = Counter(digests)
    (usual, most), *_ = counts.most_common()
    if most <= len(digests) // 2 or len(digests) == 2:
        return "the ranks differ from one another"
    others = [rank for rank, each in enumerate(digests) if each != usual]
    return f"{numbered('rank', others)} differ{'' if len(others) > 1 else 's'} from the others"
