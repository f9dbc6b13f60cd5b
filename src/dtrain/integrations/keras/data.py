"""The kinds of data that `model.fit` accepts, as data sets of single samples."""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from dtrain.errors import DtrainError

_MAX_CACHED = 4
"""The number of batches of a PyDataset to cache: one batch of dtrain takes its samples from a few
of them."""


def as_dataset(data: Any, steps_per_epoch: int | None = None) -> Any:
    """Return data of any kind as a data set of single samples; None stays None.

    Args:
        data: arrays `(x, y)` or `(x, y, sample_weight)`, each of which may be a dict, list or tuple
            of arrays; a data set of such samples; a DataLoader or PyDataset, whose batches are
            split into samples; a function that returns a generator of batches.
        steps_per_epoch: the number of batches in an epoch, for a generator that has no end.

    Raises:
        DtrainError: the order or the ranks' shares cannot be computed for this data.
    """
    import keras

    if isinstance(data, tuple | list):
        return _of_arrays(tuple(part for part in data if part is not None))
    if isinstance(data, keras.utils.PyDataset):
        return Rows(data)
    if isinstance(data, DataLoader):
        return _of_loader(data)
    if inspect.isgenerator(data) or hasattr(data, "__next__"):
        raise DtrainError(
            f"a {type(data).__name__} can be read only once, but every process needs its own, and "
            "a new one in each epoch: give the function that returns it",
            code="keras.one-pass-data",
        )
    if callable(data) and not hasattr(data, "__getitem__"):
        return Stream(data, steps_per_epoch)
    return data


class Samples(Dataset[Any]):
    """A data set of arrays: sample i is element i of each array, in the same nesting."""

    def __init__(self, parts: Any) -> None:
        import keras

        self._map = keras.tree.map_structure
        self._parts = self._map(_tensor, parts)
        lengths = {len(leaf) for leaf in keras.tree.flatten(self._parts)}
        if len(lengths) != 1:
            raise DtrainError(
                f"arrays have different numbers of samples: {sorted(lengths)}",
                code="keras.unequal-arrays",
            )
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._map(lambda part: part[index], self._parts)


class Rows(Dataset[Any]):
    """The samples of a `keras.utils.PyDataset`, whose items are batches of one size.

    Item i must be the same at all times and in all processes. `on_epoch_end` is never called,
    because dtrain decides the order.

    Raises:
        DtrainError: the PyDataset has no length.
    """

    def __init__(self, batches: Any) -> None:
        if batches.num_batches is None:
            raise DtrainError(
                f"{type(batches).__name__} has no length, so no order can be computed; add "
                "__len__(), or give a function that returns a generator of batches",
                code="keras.no-length",
            )
        self._batches = batches
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._size = self._num_rows(0)
        last = batches.num_batches - 1
        self._length: int = last * self._size + self._num_rows(last)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        number, row = divmod(index, self._size)
        full = number < self._batches.num_batches - 1
        if full and self._num_rows(number) != self._size:
            raise DtrainError(
                f"item {number} of {type(self._batches).__name__} has {self._num_rows(number)} "
                f"samples, item 0 has {self._size}; all but the last must have the same number",
                code="keras.unequal-batches",
            )
        return _row(self._batch(number), row)

    def __getitems__(self, indices: Any) -> list[Any]:
        """Return several samples; every item is read once for them."""
        order = np.argsort(np.asarray(indices), kind="stable")
        found = {int(position): self[int(indices[position])] for position in order}
        return [found[position] for position in range(len(found))]

    def _batch(self, number: int) -> Any:
        if number not in self._cache:
            while len(self._cache) >= _MAX_CACHED:
                self._cache.popitem(last=False)
            self._cache[number] = _tensors(self._batches[number])
        return self._cache[number]

    def _num_rows(self, number: int) -> int:
        return _num_rows(self._batch(number))


class Stream(IterableDataset[Any]):
    """The samples of a generator of batches, which starts again in each epoch."""

    def __init__(self, make: Callable[[], Any], steps_per_epoch: int | None) -> None:
        self._make = make
        self._steps = steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.islice(self._make(), self._steps):
            whole = _tensors(batch)
            for index in range(_num_rows(whole)):
                yield _row(whole, index)


def _of_arrays(parts: tuple[Any, ...]) -> Any:
    if any(isinstance(part, dict | tuple | list) for part in parts):
        return Samples(parts)
    return TensorDataset(*map(_tensor, parts))


def _of_loader(loader: DataLoader[Any]) -> Any:
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler)
    if isinstance(loader.dataset, IterableDataset) or (
        plain and loader.collate_fn is default_collate
    ):
        return loader.dataset
    raise DtrainError(
        "a DataLoader with its own sampler or collate_fn cannot be used: return its data set; in a "
        "KerasTask, write the order as sample_order() or sample_weights(), and collate()",
        code="keras.own-loader",
    )


def _tensor(part: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(part) if not isinstance(part, torch.Tensor) else part)


def _tensors(batch: Any) -> Any:
    """Return a batch with tensors in place of arrays, without the parts that are None."""
    import keras

    given = batch if isinstance(batch, tuple) else (batch,)
    return tuple(keras.tree.map_structure(_tensor, part) for part in given if part is not None)


def _row(batch: Any, index: int) -> Any:
    import keras

    return keras.tree.map_structure(lambda part: part[index], batch)


def _num_rows(batch: Any) -> int:
    import keras

    return int(keras.tree.flatten(batch)[0].shape[0])
