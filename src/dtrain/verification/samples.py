"""Finds errors in the samples of a step: wrong samples, a wrong order, or wrong contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dtrain.trace import Recording
from dtrain.verification.layouts import Layout
from dtrain.verification.rules import DATA, Finding
from dtrain.words import few, numbered


def of_order(
    reference: Recording, other: Recording, layout: Layout, step: int
) -> Iterator[Finding]:
    """Yield a finding if a step has different samples, or the same in a different order."""
    expected, actual = reference.ids(step), other.ids(step)
    if expected != actual:
        observation, cause = _explain_data(reference, other, layout, step)
        yield Finding(DATA, observation, cause, step)


def _explain_data(
    reference: Recording, other: Recording, layout: Layout, step: int
) -> tuple[str, str]:
    """Return (observation, likely cause) of different samples in a step."""
    expected, actual = reference.ids(step), Counter(other.ids(step))
    ranks = [[i for part in line.ids for i in part] for line in other.lines(step)]
    copies = len(ranks) > 1 and ranks[0] != [] and all(part == ranks[0] for part in ranks[1:])
    again = [i for i, count in actual.items() if count > 1]
    missing = [i for i in expected if i not in actual]
    origin = next((s for s in reference.steps if s and actual.keys() <= {*reference.ids(s)}), None)
    read = f"{'different samples' if origin is None else f'the samples of step {origin}'} were read"
    is_new_epoch = {line.epoch for line in reference.lines(step)} != {0}
    is_first = all(reference.ids(s) == other.ids(s) for s in range(1, step))
    explanations = (
        (
            step == 1 and copies,
            "all ranks read the same samples",
            "the data are not split between the ranks",
        ),
        (
            again and actual.keys() != {*expected},
            f"samples {few(again)} were read by several ranks",
            "each rank makes the order from its own seed",
        ),
        (
            again,
            f"samples {few(again)} were read {max(actual.values(), default=0)} times",
            "shares are padded to equal length by repeating samples (DistributedSampler)",
        ),
        (
            actual == Counter(expected),
            "the same samples were read in a different order",
            "samples are assigned to the ranks in a different order",
        ),
        (
            actual.keys() < {*expected},
            f"samples {few(missing)} were not read",
            "shares are cut to equal length: the remaining samples are dropped (drop_last)",
        ),
        (
            layout.resume_after is not None and step == layout.resume_after + 1,
            read,
            "the resumed run continued at a wrong position in the data",
        ),
        (
            is_new_epoch and is_first,
            read,
            "the new epoch repeats the order of the previous one (set_epoch() is not called)",
        ),
        (True, read, "the order is made from a different seed, or is a different permutation"),
    )
    return next((observation, cause) for holds, observation, cause in explanations if holds)


def of_contents(
    reference: Recording, other: Recording, layout: Layout, step: int
) -> Iterator[Finding]:
    """Yield a finding if samples with the same id have different contents."""
    wrong = other_contents(reference, other, step)
    if not any(wrong):
        return
    rank = next(rank for rank, samples in enumerate(wrong) if samples)
    sample, path = next(iter(wrong[rank].items()))
    observation = f"sample {sample} has different content on rank {rank}"
    observation += f": its {path} differs" if path else ""
    steps = [s for s in range(step, reference.last_step + 1) if s in other.steps]
    ever = {r for s in steps for r, each in enumerate(other_contents(reference, other, s)) if each}
    if len(ever) < len(wrong) and layout.resume_after is None:
        where = numbered("rank", sorted(ever))
        cause = f"different data on {where}: a stale file, or a data set that uses its rank"
    else:
        cause = (
            "the data set draws from a generator of its own, counts its calls, or uses the order "
            "of a Python set, which depends on PYTHONHASHSEED: a sample must depend only on its "
            "id (draw from dtrain.sample_rng())"
        )
    yield Finding(DATA, observation, cause, step)


def other_contents(reference: Recording, other: Recording, step: int) -> list[dict[int, str]]:
    """Return for each rank its samples with different contents, each with the leaf that differs."""
    known = {i: content for rank in reference.contents(step) for i, content in rank.items()}
    return [
        {
            sample: next(
                path for path in expected | actual if expected.get(path) != actual.get(path)
            )
            for sample, actual in rank.items()
            for expected in [known.get(sample, actual)]
            if expected != actual
        }
        for rank in other.contents(step)
    ]
