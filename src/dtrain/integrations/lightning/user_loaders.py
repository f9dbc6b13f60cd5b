"""What is taken out of a user's DataLoader: its data set, how it makes a batch, which samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import default_collate

from dtrain.errors import UsageError
from dtrain.task import Task


def dataset_of(task: Task, name: str, loader: Any) -> Any:
    """A loader's data set; its way to make a batch becomes the task's.

    Raises:
        UsageError: it is no DataLoader of torch; names the module, `name`.
    """
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"{name}: a loader is a {type(loader).__name__}; the data set is taken out of a torch "
            "DataLoader here"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise UsageError(
            f"{name}: a loader with batch_size=None, whose data set makes batches by itself; here "
            "it has to give samples, of which batches of the job's size are made"
        )
    vars(task).pop("collate", None)
    if loader.collate_fn is not default_collate:
        task.collate = loader.collate_fn  # type: ignore[method-assign]
    return loader.dataset


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


def takes_all(sampler: Any) -> bool:
    """Whether a sampler is one of torch's that draw each sample once, in whatever order."""
    if type(sampler) not in (SequentialSampler, RandomSampler):
        return sampler is None
    once = not getattr(sampler, "replacement", False)
    return once and len(sampler) == len(sampler.data_source)


def weights_of(sampler: Any) -> Any:
    """Those of torch's WeightedRandomSampler, if it draws as many samples as there are."""
    if type(sampler) is not WeightedRandomSampler or not sampler.replacement:
        return None
    return sampler.weights if sampler.num_samples == len(sampler.weights) else None


def described(sampler: Any) -> str:
    shown = {name: getattr(sampler, name, None) for name in ("num_samples", "replacement")}
    told = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    return type(sampler).__name__ + (f" ({told})" if told else "")
