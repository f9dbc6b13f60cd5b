"""The search for the ranks that read another stream than the others, and for the first difference.

It runs only once, at the end of a run.
"""

from __future__ import annotations

from dtrain.errors import BlamedError
from dtrain.train import collectives
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.data.stream import Block
from dtrain.train.vote import vote

_REMEDY = (
    "a stream must give every rank the same samples in the same order; dtrain gives each rank its "
    "part of them\nremove code that shards or shuffles by RANK, get_rank() or get_worker_info(), "
    "or set data.stream: sharded"
)


def explain(batch: GlobalBatch, block: Block, rank: int) -> BlamedError:
    """Return the error, with the same message on every rank. All ranks must call it."""
    mine = (batch.epoch, batch.start, block.stop, block.ends_epoch)
    everyone = collectives.gather_to_all((mine, tuple(block.contents.items())))
    ballot = vote(everyone)
    suspect = ballot.others[0] if ballot.others else ballot.reference
    expected, found = everyone[ballot.reference], everyone[suspect]
    lines = [
        f"train_dataset() gives the ranks different streams, seen in step {batch.step + 1}:",
        str(ballot),
        _difference(expected, found, ballot.reference, suspect),
        _REMEDY,
    ]
    return BlamedError("\n".join(lines), ballot.culprits, rank, code="data.streams-differ")


Given = tuple[tuple[int, int, int, bool], tuple[tuple[int, int], ...]]
"""Epoch, start, stop and whether the stream ends there; and digests by position."""


def _difference(expected: Given, found: Given, reference: int, suspect: int) -> str:
    """Describe the first position at which two ranks' streams differ."""
    epoch, start, stop, ends = expected[0]
    their_epoch, their_start, their_stop, their_ends = found[0]
    if (epoch, start) != (their_epoch, their_start):
        return (
            f"rank {suspect} is at position {their_start} of epoch {their_epoch}, rank "
            f"{reference} at {start} of epoch {epoch}"
        )
    one, other = dict(expected[1]), dict(found[1])
    for position in sorted(one.keys() & other.keys()):
        if one[position] != other[position]:
            return (
                f"the sample at position {position} of epoch {epoch} is the first that differs: "
                f"rank {suspect} reads another than rank {reference}"
            )
    shorter, longer = suspect, reference
    if (stop, not ends) < (their_stop, not their_ends):
        shorter, longer = reference, suspect
    return (
        f"position {min(stop, their_stop)} of epoch {epoch} is the first that differs: the stream "
        f"ends there on rank {shorter} and continues on rank {longer}"
    )
