"""Changes to a model or to data that single out one cause of a difference: see `Wish`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Subset, TensorDataset


def first_samples(dataset: Any, limit: int | None) -> Any:
    """The first `limit` samples of a map-style data set; others come back as they are."""
    if limit is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset
    if len(dataset) <= limit:
        return dataset
    if type(dataset) is TensorDataset:  # so that it is read in the way that it always is
        return TensorDataset(*(tensor[:limit] for tensor in dataset.tensors))
    return Subset(dataset, range(limit))


def stop_dropout(model: torch.nn.Module) -> None:
    """Set every rate of dropout to 0: of dropout modules, and attributes named after it."""
    for module in model.modules():
        for attribute in _drop_rates(module):
            setattr(module, attribute, 0.0)


def _drop_rates(module: torch.nn.Module) -> dict[str, float]:
    return {
        attribute: value
        for attribute, value in vars(module).items()
        if isinstance(value, float)
        and (attribute == "p" if isinstance(module, _DropoutNd) else "drop" in attribute.lower())
    }


def batch_norms(model: torch.nn.Module) -> list[str]:
    """Names of the modules that normalise over the samples of their own process."""
    return [name or type(module).__name__ for name, module in _batch_norms(model)]


def freeze_batch_norm(model: torch.nn.Module) -> None:
    """Let every BatchNorm use its running statistics for good, also in `model.train()`."""
    for _, module in _batch_norms(model):
        module.eval()
        vars(module)["train"] = lambda mode=True, module=module: module


def _batch_norms(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm)
    ]


def to_double(batch: Any) -> Any:
    """A batch with every real number in double precision; containers keep their types."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return type(batch)((key, to_double(value)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_double(value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_double(value) for value in batch)
    return batch


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """What is made meanwhile without a type is made in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
