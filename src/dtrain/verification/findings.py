"""Differences that show another training without any tolerance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dtrain.trace import Recording
from dtrain.verification import samples
from dtrain.verification.clauses import (
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
from dtrain.verification.pairs import Pair
from dtrain.words import numbered


def exact_findings(reference: Recording, other: Recording, pair: Pair) -> Iterator[Finding]:
    """Yield findings that need no tolerance: names, samples, learning rates, updates, replicas.

    They come step by step, so that the first finding is the earliest.
    """
    yield from _names(reference, other)
    yield from _start(reference, other)
    for step in range(1, reference.last_step + 1):
        if step not in other.steps:
            yield Finding(UPDATE, ENDED_EARLY, "", step)
            return
        yield from samples.of_order(reference, other, pair, step)
        yield from samples.of_contents(reference, other, pair, step)
        yield from _schedule(reference, other, pair, step)
        yield from _updates(reference, other, step)
        yield from _replicas(other, step)
        if not pair.is_exact:  # it seeds each shard again, in whichever process
            yield from _random(other, step)


def _names(reference: Recording, other: Recording) -> Iterator[Finding]:
    ours = set(reference.steps[0].parameters.vectors)
    theirs = set(other.steps[0].parameters.vectors)
    if ours == theirs:
        return
    strangers = sorted(ours ^ theirs)
    yield Finding(
        MODEL,
        f"parameters have other names: {', '.join(strangers[:3])}",
        "the model is built differently in several processes",
        0,
        strangers[0],
    )


def _start(reference: Recording, other: Recording) -> Iterator[Finding]:
    ours, theirs = (each.steps[0].parameters.digests for each in (reference, other))
    different = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if different:
        yield Finding(
            START,
            f"{len(different)} of {len(ours)} parameters begin with other values",
            "model() is seeded by rank or world size, or reads random numbers of its own",
            0,
            different[0],
        )
        return
    digests = [line.parameters for line in other.lines(0)]
    strangers = [rank for rank, each in enumerate(digests) if each != digests[0]]
    if strangers:
        yield Finding(
            START,
            f"{_differing(digests)} in initial values",
            "model() is seeded by rank: wrapping hides it, as rank 0's values are copied over",
            0,
        )


def _schedule(reference: Recording, other: Recording, pair: Pair, step: int) -> Iterator[Finding]:
    ours = reference.lines(step)[0].lr
    lines = [(rank, line.lr) for rank, line in enumerate(other.lines(step)) if line.lr]
    wrong = [(rank, theirs) for rank, theirs in lines if ours and theirs != ours]
    if not wrong:
        return
    _, theirs = wrong[0]
    group = next((g for g, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), 0)
    of_group = f" of group {group}" if len(ours) > 1 else ""
    those = numbered("rank", (rank for rank, _ in wrong))
    where = "" if len(wrong) == len(lines) else f" on {those}"
    found = f"the learning rate{of_group} is {theirs[group]:.6g}{where}, not {ours[group]:.6g}"
    if where:
        likely = f"something sets it on {those} alone"
    else:
        likely = _explain_schedule(reference, other, group, pair, step)
    yield Finding(SCHEDULE, found, likely, step)


def _explain_schedule(
    reference: Recording, other: Recording, group: int, pair: Pair, step: int
) -> str:
    rate = other.lines(step)[0].lr[group]
    known = {s: reference.lines(s)[0].lr for s in reference.steps}
    rates = {s: each[group] for s, each in known.items() if each}
    ratio = rate / rates[step] if rates.get(step) else 0.0
    if step == 1 and abs(ratio - pair.parts) < 1e-9:
        return f"it is multiplied by the {pair.parts} processes (linear scaling)"
    if pair.resume_after is not None and step == pair.resume_after + 1:
        return "the scheduler's state was not restored with the checkpoint"
    calls = _calls(other, step)
    alike = next((s for s in rates if s != step and _calls(reference, s) == calls), None)
    if alike is not None and rates[alike] == rate:
        return "the scheduler is stepped in loss(), once for each of its calls"
    matches = [s for s, each in rates.items() if abs(each - rate) <= 1e-12 * abs(rate)]
    if any(s == 1 + (step - 1) * pair.parts for s in matches) or _runs_ahead(rates, rate, step):
        return f"the scheduler is stepped once per process ({pair.parts}) instead of once per step"
    if matches and max(matches) < step:
        return "the scheduler is stepped too seldom"
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
        likely = "ranks decide on their own whether to skip an overflown fp16 step"
        yield Finding(UPDATE, f"ranks made {counts} updates", likely, step)
        return
    likely = "the optimizer is stepped once per micro-batch or per process"
    if counts[0] == 0:
        likely = "the fp16 loss scale is wrong or lost: the gradient overflows"
    elif expected == 0:
        likely = "an fp16 step that overflows is not skipped"
    found = f"the optimizer was stepped {counts[0]} times, not {expected}"
    yield Finding(UPDATE, found, likely, step)


def _replicas(other: Recording, step: int) -> Iterator[Finding]:
    lines = other.lines(step)
    strangers = [r for r, line in enumerate(lines) if line.parameters != lines[0].parameters]
    if strangers:
        alike = len({line.gradients for line in lines}) == 1
        yield Finding(
            REPLICAS,
            f"{_differing([line.parameters for line in lines])} in parameters",
            "the same gradient is applied in another way: other settings of the optimizer, or a "
            "write to the parameters"
            if alike
            else "gradients are not reduced: every rank trains on its own",
            step,
        )
    for name, digest in lines[0].buffers.items():
        strangers = [r for r, line in enumerate(lines) if line.buffers.get(name) != digest]
        if strangers:
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
            "every rank has the same seed: their dropout masks are copies of one another",
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
