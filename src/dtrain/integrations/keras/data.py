"""The kinds of data that `model.fit` accepts, as data sets of single samples."""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
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


def weighted(data: Any, class_weight: Mapping[int, float]) -> Any:
    """Return arrays `(x, y)` or a PyDataset with a third part: the weight of each sample's class.

    Raises:
        DtrainError: `fit` does not accept `class_weight` for this data either.
    """
    import keras

    if isinstance(data, keras.utils.PyDataset):
        return WeightedRows(data, class_weight)
    x, y = data[:2] if isinstance(data, tuple) else (data, None)
    if y is None or keras.tree.is_nested(y):
        raise DtrainError(
            "class_weight needs arrays x and y with one output, or a PyDataset, as in fit; for "
            "other data, give a weight for each sample as the third part",
            code="keras.class-weight",
        )
    return x, y, _class_weights(y, class_weight)


def _class_weights(y: Any, class_weight: Mapping[int, float]) -> Any:
    from keras.src.trainers.data_adapters import data_adapter_utils

    return data_adapter_utils.class_weight_to_sample_weights(y, class_weight)


class Samples(Dataset[Any]):
    """A data set of arrays: sample i is element i of each array, in the same nesting."""

    def __init__(self, parts: Any) -> None:
        import keras

        self._map = keras.tree.map_structure
        self._parts = self._map(_array, parts)
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
            self._cache[number] = _tensors(self._read(number))
        return self._cache[number]

    def _read(self, number: int) -> Any:
        return self._batches[number]

    def _num_rows(self, number: int) -> int:
        return _num_rows(self._batch(number))


class WeightedRows(Rows):
    """The samples of a `keras.utils.PyDataset`, with the weight of each sample's class."""

    def __init__(self, batches: Any, class_weight: Mapping[int, float]) -> None:
        self._class_weight = class_weight
        super().__init__(batches)

    def _read(self, number: int) -> Any:
        batch = tuple(self._batches[number])
        if len(batch) != 2:
            raise DtrainError(
                f"class_weight needs items (x, y) of {type(self._batches).__name__}, but item "
                f"{number} has {len(batch)} parts; fit does not accept it either",
                code="keras.class-weight",
            )
        return (*batch, _class_weights(batch[1], self._class_weight))


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
    return TensorDataset(*map(_array, parts))


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


def _array(part: Any) -> torch.Tensor:
    """Return an array as a tensor; floats have Keras's `floatx`, as in `fit`."""
    import keras

    tensor = _tensor(part)
    floatx = getattr(torch, keras.config.floatx())
    return tensor.to(floatx) if tensor.is_floating_point() else tensor


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
