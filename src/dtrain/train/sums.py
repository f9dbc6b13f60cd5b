"""Sums whose last bit does not depend on the order of addition."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Sums:
    """Sums of named vectors.

    Each is kept as two fp64 numbers: the sum, and what its rounding has lost. The order of
    addition then changes about the 106th bit, so results in fp32 are the same on any number of
    processes.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._high = self._low = torch.zeros(0, dtype=torch.float64)

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def add(self, sizes: Mapping[str, int], values: torch.Tensor) -> None:
        """Add one vector.

        Args:
            sizes: the name of each part of the vector and its number of elements, in order.
            values: the vector, in fp64.
        """
        if self._sizes != sizes or self._high.device != values.device:
            self._extend(sizes, values.device)
        total = self._high + values
        taken = total - self._high
        self._low = self._low + ((self._high - (total - taken)) + (values - taken))
        self._high = total

    def merge(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Add what `parts` of another object returned."""
        sizes = {name: part.shape[1] for name, part in parts.items()}
        if sizes:
            for row in torch.cat(list(parts.values()), dim=1):
                self.add(sizes, row)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return each sum as a tensor of shape (2, size), to exchange or to save."""
        rows = torch.stack((self._high, self._low)).cpu()
        columns = rows.split(list(self._sizes.values()), dim=1)
        return {name: each.clone() for name, each in zip(self._sizes, columns, strict=True)}

    def totals(self) -> dict[str, torch.Tensor]:
        vectors = (self._high + self._low).split(list(self._sizes.values()))
        return dict(zip(self._sizes, vectors, strict=True))

    def _extend(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """Take the layout of `sizes`; sums that it does not name are dropped."""
        known = {name: part.to(device) for name, part in self.parts().items()}
        rows = [
            known[name] if self._sizes.get(name) == size else torch.zeros(
                2, size, dtype=torch.float64, device=device
            )
            for name, size in sizes.items()
        ]  # fmt: skip
        self._sizes = dict(sizes)
        self._high, self._low = torch.cat(rows, dim=1)
