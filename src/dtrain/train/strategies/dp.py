"""`dp`: nn.DataParallel, one process with one replica per device.

On a machine without GPUs, nn.DataParallel only calls the module, so a test there would prove
nothing. This module therefore has the same semantics for the CPU. It splits the batch, copies the
model and adds the results exactly as torch does over devices, but runs one replica after another.
So one thread draws all random numbers, always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.train.context import TrainContext
from dtrain.train.loss import LossModule, LossParts
from dtrain.train.strategies.base import Strategy


class DataParallelStrategy(Strategy):
    """Cuts each micro-batch into one part per replica, and adds their sums on the first replica.

    Adding sums and weights, instead of averaging the means of replicas, keeps a smaller last part
    exact. BatchNorm sees one part at a time, and the first replica's statistics are kept.
    """

    def __init__(self, context: TrainContext) -> None:
        super().__init__(context)
        self._require_one_process("dp")
        self._parallel: torch.nn.Module | None = None

    def prepare(self, module: LossModule) -> None:
        super().prepare(module)
        gatherable = GatherableLoss(module)
        replicas = self.context.local_devices
        if self.context.device.type == "cuda":
            self._parallel = torch.nn.DataParallel(gatherable, device_ids=list(range(replicas)))
        else:
            self._parallel = CpuDataParallel(gatherable, replicas)

    def loss(self, batch: Any, num_samples: int, *, last: bool) -> LossParts:
        assert self._parallel is not None
        check_scatterable(batch, num_samples)
        sums, weights = self._parallel(batch, torch.arange(num_samples))
        return sums.sum(), weights.sum()

    def close(self) -> None:
        super().close()
        self._parallel = None


def check_scatterable(batch: Any, num_samples: int, path: str = "batch") -> None:
    """Raise unless cutting every tensor along dimension 0 cuts the batch into samples.

    torch's scatter copies everything that is not a tensor to every replica, and cuts tensors of
    other lengths at other positions. It reports neither.
    """
    if isinstance(batch, torch.Tensor):
        if batch.dim() == 0 or batch.shape[0] != num_samples:
            raise DtrainError(
                f"strategy 'dp' cuts every tensor along dimension 0 into samples, but {path} has "
                f"shape {tuple(batch.shape)} in a batch of {num_samples}; put the samples first "
                "in collate(), or use strategy 'ddp'",
                code="strategy.batch-cannot-be-cut",
            )
    elif isinstance(batch, dict):
        for key, value in batch.items():
            check_scatterable(value, num_samples, f"{path}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            check_scatterable(value, num_samples, f"{path}[{index}]")
    elif batch is not None:
        raise DtrainError(
            f"strategy 'dp' can only cut tensors, but {path} is {type(batch).__name__}; make it "
            "a tensor in collate(), or use strategy 'ddp'",
            code="strategy.batch-cannot-be-cut",
        )


def scatter(batch: Any, num_parts: int) -> list[Any]:
    """Return a batch cut along dimension 0, in the way of `torch.chunk`, in at most `num_parts`."""
    if isinstance(batch, torch.Tensor):
        return list(batch.chunk(num_parts))
    if isinstance(batch, dict) and batch:
        columns = [scatter(value, num_parts) for value in batch.values()]
        return [type(batch)(zip(batch, row, strict=True)) for row in _rows(columns)]
    if isinstance(batch, list | tuple) and batch:
        rows = _rows([scatter(value, num_parts) for value in batch])
        if hasattr(batch, "_fields"):
            return [type(batch)(*row) for row in rows]
        return [type(batch)(row) for row in rows]
    return [batch] * num_parts


def _rows(columns: list[list[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*columns, strict=False))  # the shortest ends it, the same as in torch's scatter


def replicate(module: torch.nn.Module, num_replicas: int) -> list[torch.nn.Module]:
    """Return copies of a module whose gradients flow back to the parameters of the original.

    This follows torch.nn.parallel.replicate: parameters of a copy are plain tensors. The first
    copy has the buffers of the original, so its BatchNorm statistics are kept. The buffers of the
    other copies are discarded.
    """
    return [_replica(module, first=index == 0) for index in range(num_replicas)]


def _replica(module: torch.nn.Module, *, first: bool) -> torch.nn.Module:
    copies = {id(item): item._replicate_for_data_parallel() for item in module.modules()}
    tensors: dict[int, torch.Tensor] = {}  # by identity, so that tied weights stay tied

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in tensors:
            tensors[id(tensor)] = tensor.view_as(tensor) if first else tensor.clone()
        return tensors[id(tensor)]

    for item in module.modules():
        copy = copies[id(item)]
        copy._former_parameters = {}
        for name, child in item._modules.items():
            copy._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in item._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, copied(parameter))
                copy._former_parameters[name] = copied(parameter)
        for name, buffer in item._buffers.items():
            copy._buffers[name] = buffer if buffer is None or first else copied(buffer)
    return copies[id(module)]


class GatherableLoss(torch.nn.Module):
    """A `LossModule` whose results have one element each, so that they gather along dimension 0."""

    def __init__(self, module: LossModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum, weight), each of shape (1,).

        `rows` is cut in the same way as the batch; its length is the number of samples.
        """
        total, weight = self.module(batch, len(rows))
        return total.reshape(1), torch.as_tensor(
            weight, dtype=torch.float64, device=total.device
        ).reshape(1)


class CpuDataParallel(torch.nn.Module):
    def __init__(self, module: GatherableLoss, num_replicas: int) -> None:
        super().__init__()
        self.module = module
        self._num_replicas = num_replicas

    def forward(self, batch: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = scatter((batch, rows), self._num_replicas)
        replicas = replicate(self.module, len(parts))
        results = [replica(*part) for replica, part in zip(replicas, parts, strict=True)]
        sums, weights = zip(*results, strict=True)
        return torch.cat(sums), torch.cat(weights)
