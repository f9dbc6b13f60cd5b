"""Builds the objects that are trained from a task, the same on every rank."""

from __future__ import annotations

import logging
from typing import Any

from dtrain.errors import BlamedError, UsageError
from dtrain.train import collectives, contract
from dtrain.train.checks.initial_state import compare_model, compare_optimizer
from dtrain.train.context import TrainContext
from dtrain.train.data.iterable_pipeline import StreamFeed
from dtrain.train.data.pipeline import Feed, MapFeed
from dtrain.train.data.sharded_pipeline import ShardedFeed
from dtrain.train.data.stream import is_stream
from dtrain.train.loop.evaluation import Evaluators
from dtrain.train.loop.progress import data_identity
from dtrain.train.loop.step import Parts, make_scaler
from dtrain.train.loss import LossModule
from dtrain.train.metrics.events import Events
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.strategies.base import Strategy
from dtrain.train.strategies.forwards import change_forwards, graphs
from dtrain.train.vote import vote
from dtrain.train.weights.initial import InitialWeights

logger = logging.getLogger(__name__)


def build_parts(context: TrainContext, strategy: Strategy, initial: InitialWeights) -> Parts:
    """Return the model on its device, with loss, optimizer, scheduler and scaler.

    Its weights are those that `initial` has for it, or the ones that the task gave it.

    Every method of the task runs with its own seed, which is the same on all ranks. So no method
    changes what another draws.
    """
    task, seed = context.task, context.spec.seed
    seed_everything(derive_seed("model", seed))
    model = task.model()
    contract.check_model(model, task)
    model.to(context.device).train()
    initial.load(model)
    if collectives.in_group():
        compare_model(model, context.spec)
    change_forwards(model, context.spec, context.device)
    loss = LossModule(model, task)
    strategy.shard(loss)
    seed_everything(derive_seed("optimizer", seed))
    optimizer = task.optimizer(model)
    contract.check_optimizer(optimizer, model, task)
    compare_optimizer(model, optimizer)
    scheduler = task.scheduler(optimizer)
    contract.check_scheduler(scheduler, optimizer, task)
    return Parts(
        model, loss, optimizer, scheduler, make_scaler(context.spec.train.precision, context.device)
    )


def warn_about_parts(
    parts: Parts, total_steps: int | None, context: TrainContext, events: Events
) -> None:
    """Warn once, with a remedy, about what is not an error but probably not intended.

    Raises:
        DtrainError: the scheduler would raise before this training ends.
    """
    task = context.task
    warnings = list(contract.remarks_on_length(parts.scheduler, total_steps, task))
    for warning in warnings:
        events.write("schedule_length", detail=warning)
    names = contract.left_out(parts.optimizer, parts.model)
    if names:
        events.write("not_optimized", parameters=names)
        warnings.append(
            f"{contract.named(task, 'optimizer')} returned an optimizer without {len(names)} "
            f"trainable parameters, for example {names[0]}, so they never change: give them to it, "
            "or freeze them with requires_grad_(False), which saves computing their gradients"
        )
    if context.ranks.is_rank_zero:
        for warning in warnings:
            logger.warning("%s", warning)


def warn_of_nothing_compiled(context: TrainContext, events: Events) -> None:
    """Warn after the first step if `train.compile` has had no effect."""
    if graphs():
        return
    events.write("nothing_compiled")
    if context.ranks.is_rank_zero:
        logger.warning(
            "train.compile has compiled nothing: %s calls no module of the model that torch could "
            "compile (it calls modules, for example model(x); torch.compile is also off with "
            "TORCH_COMPILE_DISABLE=1)",
            contract.named(context.task, "loss"),
        )


def train_feed(context: TrainContext) -> Feed:
    """Return this rank's pipeline of the task's training data."""
    spec = context.spec
    seed_everything(derive_seed("train_dataset", spec.seed))
    dataset = context.task.train_dataset()
    contract.check_data(dataset, contract.named(context.task, "train_dataset"))
    kind: type[MapFeed] | type[StreamFeed] = MapFeed
    if is_stream(dataset):
        kind = StreamFeed if spec.data.stream == "same" else ShardedFeed
    elif spec.data.stream != "same":
        raise UsageError(
            f"data.stream: {spec.data.stream} is for data sets that can only be iterated, but "
            f"train_dataset() returned {type(dataset).__name__}\ndtrain distributes its samples: "
            "remove data.stream, and the code that shards the data set by rank",
            code="data.stream-of-map-style",
        )
    return kind(dataset, context.task, spec, context.ranks, pin_memory=pins_memory(context))


def feed_identity(feed: Feed) -> dict[str, Any]:
    """Return everything that the meaning of a position in this data depends on.

    Raises:
        DtrainError: it is not the same on all ranks.
    """
    identity = data_identity(feed.spec, feed.dataset, feed.course.num_samples, feed.order.name)
    everyone = collectives.gather_to_all(identity)
    ballot = vote([repr(theirs) for theirs in everyone])
    if ballot.others:
        reference, other = everyone[ballot.reference], everyone[ballot.others[0]]
        key = next(key for key in identity if reference[key] != other[key])
        what = (
            "train_dataset()" if key in ("num_samples", "fingerprint") else "the order of samples"
        )
        raise BlamedError(
            f"{what} differs {ballot.where}: {key} is {ballot.sides(other[key], reference[key])}; "
            "every rank must see the same data, and dtrain gives each rank its part",
            ballot.culprits,
            feed.ranks.rank,
            code="data.not-same-on-ranks",
        )
    return identity


def make_evaluators(context: TrainContext) -> Evaluators | None:
    seed_everything(derive_seed("eval_dataset", context.spec.seed))
    dataset = context.task.eval_dataset()
    if dataset is None:
        return None
    return Evaluators(context, dataset, pin_memory=pins_memory(context))


def pins_memory(context: TrainContext) -> bool:
    requested = context.spec.data.pin_memory
    return context.device.type == "cuda" if requested == "auto" else bool(requested)
