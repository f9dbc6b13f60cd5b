"""Buffers that a forward changes, as BatchNorm's running statistics, made independent of order.

Every shard starts from the same values. Afterwards a floating-point buffer becomes the mean of
what the shards made of it: BatchNorm's statistics decay once per optimizer step and take in the
mean over the shards, as they take in one whole batch in one process. Other types (counters,
flags) keep what the first shard made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dtrain.errors import DtrainError


class ShardBuffers:
    """The buffers of a model, while its shards are computed one after the other.

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
        """For each buffer a tensor of the shape and type in which its values are added."""
        return [slot.like for slot in self._slots]

    def start_step(self) -> None:
        """Keep the values from which every shard starts."""
        self._counts = [0] * len(self._slots)
        for slot in self._slots:
            slot.keep()

    def take(self, *, first: bool) -> dict[int, torch.Tensor]:
        """What the shard just computed made of buffers, by index; starts afresh."""
        made = {index: slot.take(first=first) for index, slot in enumerate(self._slots)}
        taken = {index: value for index, value in made.items() if value is not None}
        for index in taken:
            self._counts[index] += 1
        return taken

    def counts(self) -> list[int]:
        """How many shards' values were taken in this step, for each buffer."""
        return self._counts

    def finish_step(self, sums: Mapping[int, tuple[torch.Tensor, int]]) -> None:
        """Give the buffers that changed (by index) their new values, from (sum, count)."""
        for index, (total, count) in sums.items():
            slot = self._slots[index]
            slot.tensor.copy_(total / count if total.is_floating_point() else total)


class _Slot:
    """One buffer: its tensor, where it lives, and the values it had at the step's start."""

    def __init__(self, module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        self.module = module
        self.name = name
        self.tensor = tensor
        self.like = _addable(tensor)
        self._start = tensor.clone()
        self._version = tensor._version
        self._unversioned: bool | None = None
        """Whether kernels change it without counting up its version, as batch norm's do to its
        statistics; found out with the first shard, since comparing large constants costs."""

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
        """Whether it holds other values than at the step's start."""
        moved = tensor is not self.tensor or tensor._version != self._version
        if not moved and self._unversioned is False:
            return False
        changed = not torch.equal(tensor, self._start)
        if not moved:
            norm = isinstance(self.module, torch.nn.modules.batchnorm._NormBase)
            self._unversioned = changed or norm
        return changed


def _addable(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a type that adds without loss: at least fp32, or int64."""
    if not tensor.is_floating_point():
        return tensor.detach().long()
    low = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if low else tensor.detach()
