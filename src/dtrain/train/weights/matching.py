"""Which stored tensor belongs to which tensor of a model, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dtrain.train.checkpoint.state import plain_name

_OF_DDP = "module."


@dataclass(frozen=True)
class Names:
    """The stored names of a model's tensors."""

    stored: dict[str, str]
    """The stored name by the name in the model, for every stored tensor. It includes names that
    the model does not have."""
    prefix: str = ""
    """The prefix by which the names differ."""
    added: bool = False
    """True if the prefix was added to the stored names. Otherwise it was removed."""
    ambiguous: list[str] = field(default_factory=list)
    """The prefixes of which each would do; then none is used."""


def match(own: Sequence[tuple[str, ...]], stored: Collection[str]) -> Names:
    """Return which stored name belongs to which name of a model.

    If no name is the same, all names of one side may have a common prefix, for example because
    the model was a part of a larger one.

    Args:
        own: the names in the model; those of one tensor are together.
        stored: the stored names.
    """
    known = {name for names in own for name in names}
    plain = {plain_name(name): name for name in stored}
    unwrapped = {name.removeprefix(_OF_DDP): each for name, each in plain.items()}
    for given, prefix in ((plain, ""), (unwrapped, _OF_DDP)):
        if known & given.keys():
            return Names(given, prefix)
    for given in (unwrapped, plain):
        found = _by_prefix(own, given)
        if found is not None:
            return found
    return Names(plain)


def _by_prefix(own: Sequence[tuple[str, ...]], given: dict[str, str]) -> Names | None:
    """Return the names with the prefix that the most tensors match by, if there is one."""
    others = [(name,) for name in given]
    counts: dict[tuple[str, bool], int] = {}
    for longer, shorter, added in ((others, own, False), (own, others, True)):
        number = {name: index for index, names in enumerate(longer) for name in names}
        for prefix in _candidates(longer, shorter):
            hits = [
                {number[prefix + n] for n in names if prefix + n in number} for names in shorter
            ]
            matched = set().union(*hits)
            if matched and (all(hits) or len(matched) == len(longer)):
                counts[prefix, added] = len(matched)
    most = max(counts.values(), default=0)
    best = [each for each, count in counts.items() if count == most]
    if not best:
        return None
    if len(best) > 1:
        return Names(given, ambiguous=sorted(prefix for prefix, _ in best))
    ((prefix, added),) = best
    if added:
        return Names({prefix + name: each for name, each in given.items()}, prefix, added=True)
    return Names({name.removeprefix(prefix): each for name, each in given.items()}, prefix)


def _candidates(longer: Sequence[tuple[str, ...]], shorter: Sequence[tuple[str, ...]]) -> set[str]:
    """Return prefixes without which all names of one side may be among those of the other."""
    if not longer or not shorter:
        return set()
    common = {prefix for name in longer[0] for prefix in _prefixes(name)}
    names = [name for tied in longer for name in tied]
    of_others = {
        name.removesuffix(end) for end in shorter[0] for name in names if name.endswith(f".{end}")
    }
    return {
        prefix for prefix in common if all(any(n.startswith(prefix) for n in t) for t in longer)
    } | of_others


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) + "." for length in range(1, len(parts)))


def tied(tensors: dict[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Return the names of tensors; those of exactly the same memory are together."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, each in tensors.items():
        memory: tuple[object, ...] = (name,)
        if not torch.nn.parameter.is_lazy(each) and not each.is_meta and each.numel():
            start = each.untyped_storage().data_ptr()
            memory = (start, each.storage_offset(), each.shape, each.stride(), each.dtype)
        found.setdefault(memory, []).append(name)
    return [tuple(names) for names in found.values()]
