"""From a task to the things that are trained, alike on every rank."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.errors import BlamedError, DtrainError, UsageError
from dtrain.train import collectives
from dtrain.train.checks.start import compare_model, compare_optimizer
from dtrain.train.context import TrainContext
from dtrain.train.data.feed import Feed, MapFeed
from dtrain.train.data.sharded_feed import ShardedFeed
from dtrain.train.data.stream import is_stream
from dtrain.train.data.stream_feed import StreamFeed
from dtrain.train.loss import LossModule
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.strategies.base import Strategy
from dtrain.train.trainers.evaluation import Evaluators
from dtrain.train.trainers.progress import data_identity
from dtrain.train.trainers.step import Parts, make_scaler
from dtrain.train.vote import vote


def build_parts(context: TrainContext, strategy: Strategy) -> Parts:
    """The model on its device, with loss, optimizer, scheduler and scaler.

    Every method of the task runs with its own seed, the same on all ranks, so that none of them
    changes what another draws.

    Raises:
        DtrainError: the task returned something that cannot be trained.
    """
    task, seed = context.task, context.spec.seed
    seed_everything(derive_seed("model", seed))
    model = task.model()
    if not isinstance(model, torch.nn.Module):
        raise DtrainError(f"model() returned {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DtrainError("model() returned a model without trainable parameters")
    model.to(context.device).train()
    if collectives.in_group():
        compare_model(model, broadcast=context.spec.checks.init == "broadcast")
    loss = LossModule(model, task)
    strategy.shard(loss)
    seed_everything(derive_seed("optimizer", seed))
    optimizer = task.optimizer(model)
    compare_optimizer(model, optimizer)
    scheduler = task.scheduler(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise DtrainError(
            "scheduler() returned ReduceLROnPlateau, which is stepped with a metric; schedulers "
            "are stepped after every optimizer step here, so take one that counts steps"
        )
    return Parts(
        model, loss, optimizer, scheduler, make_scaler(context.spec.train.precision, context.device)
    )


def train_feed(context: TrainContext) -> Feed:
    """The task's training data, as this rank takes part in it."""
    spec = context.spec
    seed_everything(derive_seed("train_dataset", spec.seed))
    dataset = context.task.train_dataset()
    kind: type[MapFeed] | type[StreamFeed] = MapFeed
    if is_stream(dataset):
        kind = StreamFeed if spec.data.stream == "same" else ShardedFeed
    elif spec.data.stream != "same":
        raise UsageError(
            f"data.stream: {spec.data.stream} is for data sets that can only be iterated, and "
            f"train_dataset() returned {type(dataset).__name__}\nits samples are dealt out by "
            "dtrain: remove data.stream, and what shards the data set by rank"
        )
    return kind(dataset, context.task, spec, context.ranks, pin_memory=pins_memory(context))


def feed_identity(feed: Feed) -> dict[str, Any]:
    """What a position in this data depends on.

    Raises:
        DtrainError: it is not the same on all ranks.
    """
    identity = data_identity(feed.spec, feed.dataset, feed.course.num_samples, feed.order.name)
    everyone = collectives.gather_to_all(identity)
    ballot = vote([repr(theirs) for theirs in everyone])
    if ballot.others:
        ours, theirs = everyone[ballot.reference], everyone[ballot.others[0]]
        key = next(key for key in identity if ours[key] != theirs[key])
        what = (
            "train_dataset()" if key in ("num_samples", "fingerprint") else "the order of samples"
        )
        raise BlamedError(
            f"{what} differs {ballot.where}: {key} is {ballot.sides(theirs[key], ours[key])}; "
            "every rank must see the same data, dtrain gives each its part",
            ballot.culprits,
            feed.ranks.rank,
        )
    return identity


def make_evaluators(context: TrainContext) -> Evaluators | None:
    """What evaluates the task; None when it has no evaluation data."""
    seed_everything(derive_seed("eval_dataset", context.spec.seed))
    dataset = context.task.eval_dataset()
    if dataset is None:
        return None
    return Evaluators(context, dataset, pin_memory=pins_memory(context))


def pins_memory(context: TrainContext) -> bool:
    """Whether batches go through page-locked memory; `auto` means with a GPU."""
    wish = context.spec.data.pin_memory
    return context.device.type == "cuda" if wish == "auto" else bool(wish)
