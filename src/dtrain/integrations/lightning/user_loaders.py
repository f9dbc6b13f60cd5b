"""What is taken out of a user's DataLoader: its data set, how it makes a batch, which samples."""

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

from dtrain.integrations.lightning.suits import NeedsLoopsError
from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.data.permutation import Ids
from dtrain.train.seeding import RandomState, derive_seed, seed_everything


def dataset_of(task: Task, name: str, loader: Any) -> Any:
    """A loader's data set; its way to make a batch becomes the task's.

    Raises:
        NeedsLoopsError: it is no DataLoader of torch, or none of samples; names the module,
            `name`.
    """
    if not isinstance(loader, DataLoader):
        raise NeedsLoopsError(f"a loader of {name} is a {type(loader).__name__}")
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise NeedsLoopsError(
            f"a loader of {name}, a {type(loader).__name__}, has an __iter__() of its own"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise NeedsLoopsError(
            f"a loader of {name} has batch_size=None: its data set makes batches by itself"
        )
    vars(task).pop("collate", None)
    if loader.collate_fn is not default_collate:
        task.collate = loader.collate_fn  # type: ignore[method-assign]
    return loader.dataset


@contextlib.contextmanager
def drawing_alike(method: str, seed: int) -> Iterator[None]:
    """Give what a method that makes loaders draws random numbers of its own, as on all ranks."""
    outer = RandomState.capture()
    seed_everything(derive_seed(_OF_LOADERS.get(method, method), seed))
    try:
        yield
    finally:
        outer.restore()


_OF_LOADERS = {"train_dataloader": "train_dataset", "val_dataloader": "eval_dataset"}
"""Methods of a task that say the same."""


def flat(loaders: Any) -> list[Any]:
    """All loaders, of what `val_dataloader` may return."""
    if loaders is None:
        return []
    inside = getattr(loaders, "iterables", loaders)  # a CombinedLoader's
    if isinstance(inside, Mapping):
        inside = list(inside.values())
    if isinstance(inside, list | tuple):
        return [each for part in inside for each in flat(part)]
    return [inside]


def sampler_of(loader: Any) -> Any:
    """What says which samples a loader reads; None for a stream, which says so itself."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def makes_batches(loader: Any) -> bool:
    """Whether its sampler gives whole batches of its own."""
    return loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler


def takes_all(sampler: Any) -> bool:
    """Whether a sampler is one of torch's that draw each sample once, in whatever order.

    One that cuts an epoch into parts for the processes is: the parts are dtrain's to cut.
    """
    if type(sampler) is DistributedSampler:
        return True
    if type(sampler) not in (SequentialSampler, RandomSampler):
        return sampler is None
    once = not getattr(sampler, "replacement", False)
    return once and len(sampler) == len(sampler.data_source)


def weights_of(sampler: Any) -> Any:
    """Those of torch's WeightedRandomSampler, if it draws as many samples as there are."""
    if type(sampler) is not WeightedRandomSampler or not sampler.replacement:
        return None
    return sampler.weights if sampler.num_samples == len(sampler.weights) else None


def order_of_loader(loader: Any, seed: int, whose: str) -> tuple[Any, SamplerOrder | None]:
    """How a training loader's samples are ordered: by weights, by its own sampler, or neither.

    Called by all ranks.

    Args:
        loader: of map-style data.
        seed: of the job.
        whose: how a sentence about it begins.

    Raises:
        NeedsLoopsError: dtrain cannot deal them out.
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
    """The order that a sampler of the user's gives, as a task's `sample_order`.

    Each epoch is drawn with random numbers of its own, and the epochs in turn: a sampler may keep
    a generator of its own.
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
        """Whether all processes draw the same. Called by all ranks."""
        mine = xxhash.xxh3_64_hexdigest(self(seed, 0).tobytes())
        return len(set(collectives.gather_to_all(mine))) == 1


def evaluated_samples(loader: Any) -> Any:
    """The data set of a validation loader, or the part that its sampler takes; None if that is
    another part in each evaluation."""
    sampler = sampler_of(loader)
    if takes_all(sampler):
        return loader.dataset
    if type(sampler) is SubsetRandomSampler:
        return Subset(loader.dataset, list(sampler.indices))
    return None


def described(sampler: Any) -> str:
    shown = {name: getattr(sampler, name, None) for name in ("num_samples", "replacement")}
    told = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    return type(sampler).__name__ + (f" ({told})" if told else "")
