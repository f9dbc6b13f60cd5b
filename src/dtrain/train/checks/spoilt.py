"""Search for tensors of a training's state that are no longer finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dtrain.train import digest
from dtrain.train.checks.train_state import BUFFERS, MOMENTS, PARAMETERS, TrainState

_KINDS = (PARAMETERS, MOMENTS, BUFFERS)


class Spoilt:
    """Finds parameters, optimizer state and buffers that were finite and no longer are.

    Finite gradients do not prove this: Adam's squares overflow, a learning rate may be too large,
    and a forward whose loss is finite may write NaN into a buffer. A tensor that is not finite
    when this object is made, for example a mask of -inf, is intended.
    """

    def __init__(self, subject: TrainState) -> None:
        self._subject = subject
        self._intended = set(self._not_finite(_KINDS))

    def found(self, kinds: Iterable[str] = _KINDS) -> list[str]:
        found = self._not_finite(kinds)
        return [f"{kind} {name}" for kind, name in found if (kind, name) not in self._intended]

    def _not_finite(self, kinds: Iterable[str]) -> list[tuple[str, str]]:
        found = []
        for kind in kinds:
            tensors = self._subject.tensors(kind).items()
            here = {name: digest.local(each) for name, each in tensors if _has_nan(each)}
            if not all_finite(here.values()):
                found += [(kind, name) for name, each in here.items() if not all_finite([each])]
        return found


def and_more(found: list[str]) -> str:
    """Return a text with the number of entries after the first; empty if there are none."""
    return f", nor {len(found) - 1} more" if len(found) > 1 else ""


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all elements are finite.

    The 2-norm is NaN or infinite if any element is, and takes a tenth of the time of `isfinite`.
    It can also overflow, so only a finite norm is a proof.
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
    """Return whether elements may be NaN and have a norm; types of 8 bits have none."""
    dtype = tensor.dtype
    may = dtype.itemsize > 1 and bool(dtype.is_floating_point or dtype.is_complex)
    return may and not torch.nn.parameter.is_lazy(tensor)
