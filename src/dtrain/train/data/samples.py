"""The check, before the first step, that samples of a map-style data set are the same on all ranks.

Each of a few samples was read twice, in the process that reads all samples. If the content differs
at the second read, the data set has random numbers that dtrain does not seed. Then ranks differ
although they read the same data.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from dtrain.errors import BlamedError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.data.content import Leaf, digest, first_difference, leaves
from dtrain.train.data.fetch import Probe, Probed
from dtrain.train.vote import Vote, vote

logger = logging.getLogger(__name__)

_TIMES = 3
"""The number of times that a sample which differs between ranks is read again. A generator of the
data set's own may have returned the same number twice."""


def compare(probe: Probe, mine: Probed, read: Callable[[int, int], Any], ranks: RankInfo) -> None:
    """Make sure that all ranks read the same samples. All ranks must call it."""
    everyone = collectives.gather_to_all(mine)
    unsteady = [each for each in everyone if each.first != each.second]
    if unsteady:
        pairs = zip(probe.samples, unsteady[0].first, unsteady[0].second, strict=True)
        sample = next(int(sample) for sample, first, second in pairs if first != second)
        _warn(sample, unsteady[0].generators, ranks)
        return
    for index, sample in enumerate(probe.samples.tolist()):
        ballot = vote([each.first[index] for each in everyone])
        if ballot.others:
            _explain(ballot, sample, functools.partial(read, probe.epoch, sample), ranks)
            return


def _warn(sample: int, generators: tuple[str, ...], ranks: RankInfo) -> None:
    if not ranks.is_rank_zero:
        return
    why = "dtrain cannot seed its random numbers, or it changes what it returns"
    if generators:
        why = f"it draws from a generator of its own ({', '.join(generators)})"
    logger.warning(
        "train_dataset(): sample %d differs when it is read again: %s. A resume does not restore "
        "it, and another number of processes changes it. Draw from sample_rng() or sample_seed() "
        "of dtrain.train.data, or from the global generators, which are seeded for every sample",
        sample, why,
    )  # fmt: skip


def _explain(ballot: Vote, sample: int, read: Callable[[], Any], ranks: RankInfo) -> None:
    """Raise an error that names the first element that differs. All ranks must call it."""
    seen = [_leaves(read) for _ in range(_TIMES)]
    steady = len({digest_of for digest_of, _ in seen}) == 1
    shown = seen[0][1] if ranks.rank in (ballot.reference, ballot.others[0]) else []
    everyone = collectives.gather_to_all((steady, shown))
    if not all(steady for steady, _ in everyone):
        _warn(sample, (), ranks)
        return
    found = first_difference(everyone[ballot.others[0]][1], everyone[ballot.reference][1])
    what = "is not the same"
    if found is not None:
        path, suspect, expected = found
        what = f"{f'element {path} ' if path else ''}is {ballot.sides(suspect, expected)}"
    raise BlamedError(
        f"train_dataset() differs {ballot.where}: sample {sample}"
        f"{', ' if what.startswith('element') else ' '}{what}\n"
        "every rank must read the same data: does that node have another file or an older copy, "
        "or does the data set depend on the rank?",
        ballot.culprits,
        ranks.rank,
        code="data.not-same-on-ranks",
    )


def _leaves(read: Callable[[], Any]) -> tuple[int, list[Leaf]]:
    """Return a sample's digest and leaves; 0 and none if it cannot be read in this process."""
    try:
        sample = read()
    except Exception as error:  # the process that reads for the training has read it
        logger.debug("the sample cannot be read in this process: %r", error)
        return 0, []
    return digest(sample), list(leaves(sample))
