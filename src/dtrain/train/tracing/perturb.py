"""Changes to a model or data that isolate one cause of a difference; see `TraceOptions`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Subset, TensorDataset


def first_samples(dataset: Any, limit: int | None) -> Any:
    """Return the first `limit` samples of a map-style data set, and other data sets unchanged."""
    if limit is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset
    if len(dataset) <= limit:
        return dataset
    if type(dataset) is TensorDataset:  # dtrain reads this type in its own way
        return TensorDataset(*(tensor[:limit] for tensor in dataset.tensors))
    return Subset(dataset, range(limit))


def stop_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate to 0, in dropout modules and in attributes with such a name."""
    for _, module in _modules(model):
        for attribute in _drop_rates(module):
            setattr(module, attribute, 0.0)


def _drop_rates(module: torch.nn.Module) -> dict[str, float]:
    keras_dropout = _is_keras(module, "Dropout")
    return {
        attribute: value
        for attribute, value in vars(module).items()
        if isinstance(value, float)
        and (
            attribute == ("rate" if keras_dropout else "p")
            if keras_dropout or isinstance(module, _DropoutNd)
            else "drop" in attribute.lower()
        )
    }


def batch_norms(model: torch.nn.Module, *, training: bool = False) -> list[str]:
    """Return the names of the modules that normalise over the samples of their own process.

    Args:
        model: a model of torch or Keras.
        training: whether to leave out frozen modules, which do not do so during the training.
    """
    return [
        name or type(module).__name__
        for name, module in _batch_norms(model)
        if not training or (module.training and getattr(module, "trainable", True))
    ]


def freeze_batch_norm(model: torch.nn.Module) -> None:
    """Make every BatchNorm use its running statistics permanently, also in `model.train()`."""
    for _, module in _batch_norms(model):
        if isinstance(module, _BatchNorm):
            module.eval()
            vars(module)["train"] = lambda mode=True, module=module: module
        else:
            vars(module)["call"] = _without_training(module.call)


def is_of_keras(model: torch.nn.Module) -> bool:
    """Return whether it is a Keras model, whose layers torch does not list as modules."""
    return hasattr(model, "_flatten_layers")


def _batch_norms(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in _modules(model)
        if (isinstance(module, _BatchNorm) or _is_keras(module, "BatchNormalization"))
        and not isinstance(module, SyncBatchNorm)
    ]


def _modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    yield from model.named_modules()
    if is_of_keras(model):
        layers: Any = model
        yield from ((layer.path or layer.name, layer) for layer in layers._flatten_layers())


def _is_keras(module: torch.nn.Module, name: str) -> bool:
    """Return whether a layer is an instance of Keras's class of this name or a subclass."""
    kinds = type(module).__mro__
    return any(k.__name__.endswith(name) and k.__module__.startswith("keras.") for k in kinds)


def _without_training(call: Any) -> Any:
    @functools.wraps(call)
    def frozen(*args: Any, training: Any = None, **kwargs: Any) -> Any:
        return call(*args, training=False, **kwargs)

    return frozen


def to_double(batch: Any) -> Any:
    """Return a batch with every real number in double precision; containers keep their types."""
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
    """Use double precision as the default type of new tensors in this block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
