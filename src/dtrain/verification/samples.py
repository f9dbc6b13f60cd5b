"""Finds errors in the samples of a step: wrong samples, a wrong order, or wrong contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dtrain.trace import Recording
from dtrain.verification.clauses import DATA, Finding
from dtrain.verification.pairs import Pair
from dtrain.words import few, numbered


def of_order(reference: Recording, other: Recording, pair: Pair, step: int) -> Iterator[Finding]:
    """Yield a finding if a step has other samples, or the same in another order."""
    ours, theirs = reference.ids(step), other.ids(step)
    if ours != theirs:
        found, likely = _explain_data(reference, other, pair, step)
        yield Finding(DATA, found, likely, step)


def _explain_data(reference: Recording, other: Recording, pair: Pair, step: int) -> tuple[str, str]:
    """Return (observation, likely cause) of other samples in a step."""
    ours, theirs = reference.ids(step), Counter(other.ids(step))
    ranks = [[i for part in line.ids for i in part] for line in other.lines(step)]
    copies = len(ranks) > 1 and ranks[0] != [] and all(part == ranks[0] for part in ranks[1:])
    again = [i for i, count in theirs.items() if count > 1]
    missing = [i for i in ours if i not in theirs]
    origin = next((s for s in reference.steps if s and theirs.keys() <= {*reference.ids(s)}), None)
    read = f"{'other samples' if origin is None else f'the samples of step {origin}'} were read"
    is_new_epoch = {line.epoch for line in reference.lines(step)} != {0}
    is_first = all(reference.ids(s) == other.ids(s) for s in range(1, step))
    explanations = (
        (
            step == 1 and copies,
            "all ranks read the same samples",
            "the data are not shared out between the ranks",
        ),
        (
            again and theirs.keys() != {*ours},
            f"samples {few(again)} were read by several ranks",
            "the order comes from each rank's own seed",
        ),
        (
            again,
            f"samples {few(again)} were read {max(theirs.values(), default=0)} times",
            "shares are padded to equal length by repeating samples (DistributedSampler)",
        ),
        (
            theirs == Counter(ours),
            "the same samples came in another order",
            "ranks deal them out in another order",
        ),
        (
            theirs.keys() < {*ours},
            f"samples {few(missing)} were left out",
            "shares are cut to equal length: samples that do not divide are dropped (drop_last)",
        ),
        (
            pair.resume_after is not None and step == pair.resume_after + 1,
            read,
            "the resumed run went on at a wrong position of the data",
        ),
        (
            is_new_epoch and is_first,
            read,
            "a new epoch repeats the order of the one before (set_epoch forgotten)",
        ),
        (True, read, "the order comes from another seed, or is another permutation"),
    )
    return next((found, likely) for holds, found, likely in explanations if holds)


def of_contents(reference: Recording, other: Recording, pair: Pair, step: int) -> Iterator[Finding]:
    """Yield a finding if samples with the same number have different contents."""
    wrong = other_contents(reference, other, step)
    if not any(wrong):
        return
    rank = next(rank for rank, samples in enumerate(wrong) if samples)
    sample, path = next(iter(wrong[rank].items()))
    found = f"sample {sample} holds something else on rank {rank}"
    found += f": its {path} differs" if path else ""
    steps = [s for s in range(step, reference.last_step + 1) if s in other.steps]
    ever = {r for s in steps for r, each in enumerate(other_contents(reference, other, s)) if each}
    if len(ever) < len(wrong) and pair.resume_after is None:
        where = numbered("rank", sorted(ever))
        likely = (
            f"other data on {where}: a stale or other file, or a data set that looks at its rank"
        )
    else:
        likely = "the data set draws from a generator of its own, counts what it reads, or goes by "
        likely += "the order of a set, which the hash seed makes (PYTHONHASHSEED): what it gives "
        likely += "for a number must follow from that number (dtrain.sample_rng())"
    yield Finding(DATA, found, likely, step)


def other_contents(reference: Recording, other: Recording, step: int) -> list[dict[int, str]]:
    """Return for each rank its samples with other contents, each with the leaf that differs."""
    known = {i: content for rank in reference.contents(step) for i, content in rank.items()}
    return [
        {
            sample: next(path for path in ours | theirs if ours.get(path) != theirs.get(path))
            for sample, theirs in rank.items()
            for ours in [known.get(sample, theirs)]
            if ours != theirs
        }
        for rank in other.contents(step)
    ]
