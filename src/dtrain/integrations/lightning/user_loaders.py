"""The parts of a user's DataLoader: its data set, its collate function and its sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import default_collate
from torch.utils.data.distributed import DistributedSampler

from dtrain.integrations.lightning.needs_loops import NeedsLoopsError
from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.data.permutation import Ids
from dtrain.train.seeding import RandomState, derive_seed, seed_everything


def dataset_of(task: Task, name: str, loader: Any) -> Any:
    """Return a loader's data set, and make its collate function the task's.

    Args:
        task: the task.
        name: the name of the module, for errors.
        loader: the loader.

    Raises:
        NeedsLoopsError: the loader is not torch's DataLoader, or does not load single samples.
    """
    if not isinstance(loader, DataLoader):
        raise NeedsLoopsError(f"a loader of {name} is a {type(loader).__name__}")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise NeedsLoopsError(
            f"a loader of {name}, a {type(loader).__name__}, has an __iter__() of its own"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise NeedsLoopsError(
            f"a loader of {name} has batch_size=None: its data set makes the batches"
        )
    vars(task).pop("collate", None)
    if loader.collate_fn is not default_collate:
        task.collate = loader.collate_fn  # type: ignore[method-assign]
    return loader.dataset


@contextlib.contextmanager
def seeded_by_job(method: str, seed: int) -> Iterator[None]:
    """Seed a method that makes loaders, the same on all ranks, and restore the generators."""
    outer = RandomState.capture()
    seed_everything(derive_seed(_TASK_METHODS.get(method, method), seed))
    try:
        yield
    finally:
        outer.restore()


_TASK_METHODS = {"train_dataloader": "train_dataset", "val_dataloader": "eval_dataset"}
"""The equivalent methods of a task."""


def flat(loaders: Any) -> list[Any]:
    """Return all loaders in a value that `val_dataloader` may return."""
    if loaders is None:
        return []
    inside = getattr(loaders, "iterables", loaders)  # a CombinedLoader's
    if isinstance(inside, Mapping):
        inside = list(inside.values())
    if isinstance(inside, list | tuple):
        return [each for part in inside for each in flat(part)]
    return [inside]


def sampler_of(loader: Any) -> Any:
    """Return the sampler that chooses a loader's samples; None for a stream, which has none."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def makes_batches(loader: Any) -> bool:
    """Return whether a loader's sampler makes whole batches itself."""
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def takes_all(sampler: Any) -> bool:
    """Return whether a sampler is one of torch's that draw each sample once, in any order.

    That includes one that splits an epoch between the processes: dtrain splits it instead.
    """
    if type(sampler) is DistributedSampler:
        return True
    if type(sampler) not in (SequentialSampler, RandomSampler):
        return sampler is None
    once = not getattr(sampler, "replacement", False)
    return once and len(sampler) == len(sampler.data_source)


def weights_of(sampler: Any) -> Any:
    """Return the weights of a WeightedRandomSampler that draws as many samples as there are."""
    if type(sampler) is not WeightedRandomSampler or not sampler.replacement:
        return None
    return sampler.weights if sampler.num_samples == len(sampler.weights) else None


def order_of_loader(loader: Any, seed: int, whose: str) -> tuple[Any, SamplerOrder | None]:
    """Return the order of a training loader: its weights, its own sampler's order, or neither.

    Called by all ranks.

    Args:
        loader: a loader of map-style data.
        seed: the job's seed.
        whose: the beginning of a sentence about the loader, for errors.

    Raises:
        NeedsLoopsError: dtrain cannot distribute the samples.
    """
    sampler = sampler_of(loader)
    if makes_batches(loader):
        raise NeedsLoopsError(f"{whose} batches made by a {described(sampler)}")
    weights = weights_of(sampler)
    if weights is not None or takes_all(sampler):
        return weights, None
    order = SamplerOrder(sampler)
    if not order.same_everywhere(seed):
        raise NeedsLoopsError(f"{whose} a {described(sampler)} that differs between processes")
    return None, order


class SamplerOrder:
    """The order of a user's sampler, for a task's `sample_order`.

    Each epoch has its own random seed. The epochs are drawn in turn, because a sampler may have
    its own generator.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._drawn: dict[int, Ids] = {}

    def __call__(self, seed: int, epoch: int) -> Ids:
        first = max(self._drawn, default=-1) + 1
        for each in range(first, epoch + 1):
            seed_everything(derive_seed("order", seed, each))
            set_epoch = getattr(self._sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(each)
            self._drawn.pop(each - 2, None)
            self._drawn[each] = np.array(list(self._sampler), dtype=np.int64)
        return self._drawn[epoch]

    def same_everywhere(self, seed: int) -> bool:
        """Return whether all processes draw the same order. Called by all ranks."""
        mine = xxhash.xxh3_64_hexdigest(self(seed, 0).tobytes())
        return len(set(collectives.gather_to_all(mine))) == 1


def evaluated_samples(loader: Any) -> Any:
    """Return the data set of a validation loader, or the part that its sampler takes.

    None means that the sampler takes another part in each evaluation.
    """
    sampler = sampler_of(loader)
    if takes_all(sampler):
        return loader.dataset
    if type(sampler) is SubsetRandomSampler:
        return Subset(loader.dataset, list(sampler.indices))
    return None


def described(sampler: Any) -> str:
    shown = {name: getattr(sampler, name, None) for name in ("num_samples", "replacement")}
    details = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    return type(sampler).__name__ + (f" ({details})" if details else "")
