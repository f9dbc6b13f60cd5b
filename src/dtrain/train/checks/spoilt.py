"""Whether tensors are numbers, and what of a training's state no longer is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dtrain.train.checks import digest
from dtrain.train.checks.train_state import BUFFERS, MOMENTS, PARAMETERS, TrainState

_KINDS = (PARAMETERS, MOMENTS, BUFFERS)


class Spoilt:
    """What of parameters, optimizer state and buffers was finite and is not any more.

    Finite gradients are no proof: Adam's squares overflow, a rate may be too large, and a forward
    whose loss is finite may write NaN into a buffer. What is not finite when this is made, as a
    mask of -inf, is meant so.
    """

    def __init__(self, subject: TrainState) -> None:
        self._subject = subject
        self._meant = set(self._not_finite(_KINDS))

    def found(self, kinds: Iterable[str] = _KINDS) -> list[str]:
        found = self._not_finite(kinds)
        return [f"{kind} {name}" for kind, name in found if (kind, name) not in self._meant]

    def _not_finite(self, kinds: Iterable[str]) -> list[tuple[str, str]]:
        found = []
        for kind in kinds:
            tensors = self._subject.tensors(kind).items()
            here = {name: digest.local(each) for name, each in tensors if _has_nan(each)}
            if not all_finite(here.values()):
                found += [(kind, name) for name, each in here.items() if not all_finite([each])]
        return found


def and_more(found: list[str]) -> str:
    """How many there are besides the first, in words."""
    return f", nor {len(found) - 1} more" if len(found) > 1 else ""


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all elements are numbers.

    The 2-norm is NaN or infinite if any element is, and takes a tenth of the time of `isfinite`; it
    overflows too, so it only acquits.
    """
    dense = [each._values() if each.is_sparse else each for each in tensors]
    dense = [each for each in dense if each.numel()]
    if not dense:
        return True
    norms: Any = torch._foreach_norm(dense)
    if len({each.dtype for each in norms}) > 1:
        norms = [each.float() for each in norms]
    if bool(torch.isfinite(torch.stack(norms)).all()):
        return True
    return all(bool(torch.isfinite(each).all()) for each in dense)


def _has_nan(tensor: torch.Tensor) -> bool:
    """Whether elements may be NaN, and have a norm, which those of 8 bits do not."""
    dtype = tensor.dtype
    may = dtype.itemsize > 1 and bool(dtype.is_floating_point or dtype.is_complex)
    return may and not torch.nn.parameter.is_lazy(tensor)
