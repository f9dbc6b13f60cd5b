"""Makes buffers that a forward changes, such as BatchNorm's statistics, independent of order.

Every shard starts from the same values. Afterwards, a floating-point buffer is the mean of the
values that the shards computed. So BatchNorm's statistics decay once per optimizer step and use the
mean over the shards, in the way they use one whole batch in one process. Buffers of other types
(counters, flags) keep the value that the first shard computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dtrain.errors import DtrainError


class ShardBuffers:
    """The buffers of a model while its shards are computed one after another.

    Args:
        modules: all modules of the model. Buffers are looked up by module and name, since a
            forward may assign a new tensor instead of changing the old one.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._slots: list[_Slot] = []
        self._counts: list[int] = []
        seen: set[int] = set()
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    self._slots.append(_Slot(module, name, buffer))

    def likes(self) -> list[torch.Tensor]:
        """Return for each buffer a tensor of the shape and dtype in which its values are added."""
        return [slot.like for slot in self._slots]

    def start_step(self) -> None:
        """Keep the values from which every shard starts."""
        self._counts = [0] * len(self._slots)
        for slot in self._slots:
            slot.keep()

    def take(self, *, first: bool) -> dict[int, torch.Tensor]:
        """Return by index the buffers that the last shard changed, and reset them."""
        made = {index: slot.take(first=first) for index, slot in enumerate(self._slots)}
        taken = {index: value for index, value in made.items() if value is not None}
        for index in taken:
            self._counts[index] += 1
        return taken

    def counts(self) -> list[int]:
        """Return for each buffer the number of shards that changed it in this step."""
        return self._counts

    def finish_step(self, sums: Mapping[int, tuple[torch.Tensor, int]]) -> None:
        """Set the buffers that changed (by index) to their new values, from (sum, count)."""
        for index, (total, count) in sums.items():
            slot = self._slots[index]
            slot.tensor.copy_(total / count if total.is_floating_point() else total)


class _Slot:
    """One buffer: its tensor, its module, and its values at the start of the step."""

    def __init__(self, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        self.module = module
        self.name = name
        self.tensor = tensor
        self.like = _addable(tensor)
        self._start = tensor.clone()
        self._version = tensor._version
        self._unversioned: bool | None = None
        """Whether kernels change the buffer without incrementing its version.

        Those of batch norm do this to its statistics. It is found out with the first shard, because
        comparing large constants is slow."""

    def keep(self) -> None:
        tensor = self.module._buffers[self.name]
        if tensor is not None and self._changed(tensor):
            self._start = tensor.clone()
            self.tensor, self._version = tensor, tensor._version

    def take(self, *, first: bool) -> torch.Tensor | None:
        tensor = self.module._buffers[self.name]
        if tensor is None or tensor.shape != self.tensor.shape:
            raise DtrainError(
                f"strategy 'exact' cannot combine the buffer {self.name!r} of "
                f"{type(self.module).__name__}: a forward changed its shape from "
                f"{tuple(self.tensor.shape)}; keep what depends on the batch out of buffers",
                code="strategy.buffer-changes-shape",
            )
        if not self._changed(tensor):
            return None
        made = _addable(tensor).clone() if first or tensor.is_floating_point() else None
        self.module._buffers[self.name] = self.tensor
        with torch.no_grad():
            self.tensor.copy_(self._start)
        self._version = self.tensor._version
        return made

    def _changed(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor holds other values than at the start of the step."""
        moved = tensor is not self.tensor or tensor._version != self._version
        if not moved and self._unversioned is False:
            return False
        changed = not torch.equal(tensor, self._start)
        if not moved:
            norm = isinstance(self.module, torch.nn.modules.batchnorm._NormBase)
            self._unversioned = changed or norm
        return changed


def _addable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values in a dtype that adds without loss: at least fp32, or int64."""
    if not tensor.is_floating_point():
        return tensor.detach().long()
    low = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if low else tensor.detach()
