"""Evaluation reads every sample once, with no collective per batch.

Every rank gets the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.context import TrainContext
from dtrain.train.contract import check_dataset, described, named
from dtrain.train.data.fetch import Fetcher, Request
from dtrain.train.data.loader import Loader, eval_requests, to_device
from dtrain.train.loop.predictions import Predictions
from dtrain.train.loss import in_fp64, read_loss
from dtrain.train.precision import Precision
from dtrain.train.seeding import RandomState, derive_seed, seed_everything
from dtrain.train.sums import Sums

logger = logging.getLogger(__name__)


@dataclass
class _Tally:
    """The sums and weights that a rank has of one metric: one per batch, in fp64."""

    totals: list[float | torch.Tensor] = field(default_factory=list)
    weights: list[float | torch.Tensor] = field(default_factory=list)


class _Pass:
    """What one rank has computed of the metrics of all its batches."""

    def __init__(self) -> None:
        self.tallies: dict[str, _Tally] = {}
        self.states = Sums()
        self.state: MetricState | None = None
        """One of the states in `states`."""

    def add_state(self, state: MetricState) -> None:
        self.state = state
        self.states.add(state.sizes, state.sums)


@dataclass(frozen=True)
class MetricState:
    """What a metric of a library holds after one batch. States of batches are added up."""

    sizes: Mapping[str, int]
    """The name of each part of `sums`, and its number of elements."""
    sums: torch.Tensor
    """A vector in fp64."""
    results: Callable[[Mapping[str, torch.Tensor]], dict[str, float]]
    """Returns metrics by name for the sums of all batches by name."""


class Sections:
    """Evaluation data in several sections. Each section has its own task, which evaluates it."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks


class Evaluators:
    """Evaluates a model on all of a task's evaluation data, one section after another.

    Every rank has a share of each section, and all ranks get the same metrics of each.
    """

    def __init__(self, context: TrainContext, data: Any, *, pin_memory: bool) -> None:
        tasks = data.tasks if isinstance(data, Sections) else [None]
        self._each = [
            Evaluator(context, data, pin_memory=pin_memory)
            if task is None
            else Evaluator(replace(context, task=task), task.eval_dataset(), pin_memory=pin_memory)
            for task in tasks
        ]
        self.num_samples = sum(each.num_samples for each in self._each)

    def __call__(
        self,
        model: torch.nn.Module,
        predictions: Predictions | None = None,
        *,
        measure: bool = True,
    ) -> dict[str, float] | None:
        found: dict[str, float] = {}
        for evaluator in self._each:
            metrics = evaluator(model, predictions, measure=measure)
            if metrics is None:
                return None
            found |= metrics
        return found

    def close(self) -> None:
        for each in self._each:
            each.close()


class Evaluator:
    """Evaluates a model on the task's evaluation data. Ranks take unequal contiguous shares.

    Under strategy `exact`, a batch has the same samples on any number of processes. Each batch has
    its own random numbers, and sums over batches are rounded once. So the metrics are bitwise
    equal, and early stopping decides the same.
    """

    def __init__(self, context: TrainContext, dataset: Any, *, pin_memory: bool) -> None:
        self._context = context
        spec, ranks = context.spec, context.ranks
        self.num_samples = check_dataset(dataset, named(context.task, "eval_dataset"))
        self._origin = named(context.task, "evaluate")
        self._precision = Precision(spec.train.precision, context.device)
        fetcher = Fetcher(dataset, context.task, spec.seed)
        self._loader = Loader(fetcher, spec.data, spec.seed, pin_memory=pin_memory, lasting=True)
        self._exact = spec.strategy == "exact"
        share = self.num_samples, ranks.rank, ranks.world_size, _batch_size(context)
        self._requests = eval_requests(*share, fixed=self._exact)

    def __call__(
        self,
        model: torch.nn.Module,
        predictions: Predictions | None = None,
        *,
        measure: bool = True,
    ) -> dict[str, float] | None:
        """Return the metrics by name, or None when a rank was asked to stop during the evaluation.

        Args:
            model: the model to evaluate.
            predictions: writes the task's predictions in the same pass; None means no predictions.
            measure: whether to compute metrics; if False, the dict is empty.

        Raises:
            DtrainError: ranks returned metrics of different names, or different kinds of
                predictions.
        """
        try:
            metrics = self._combine(self._run_isolated(model, predictions, measure))
            if predictions is not None and metrics is not None:
                predictions.finish()
        except BaseException:
            if predictions is not None:
                predictions.discard()
            raise
        if predictions is not None and metrics is None:
            predictions.discard()
        return metrics

    def close(self) -> None:
        self._loader.close()

    def _run_isolated(
        self, model: torch.nn.Module, predictions: Predictions | None, measure: bool
    ) -> _Pass | None:
        """Run one pass, then restore the model's mode and the random number generators."""
        before = RandomState.capture()
        was_training = model.training
        seed = self._context.spec.seed
        seed_everything(derive_seed("evaluation", seed, self._context.ranks.rank))
        model.eval()
        try:
            with torch.no_grad():
                return self._run(model, predictions, measure)
        finally:
            model.train(was_training)
            before.restore()

    def _run(
        self, model: torch.nn.Module, predictions: Predictions | None, measure: bool
    ) -> _Pass | None:
        done = _Pass()
        batches = self._loader.batches(self._requests)
        for request, batch in zip(self._requests, batches, strict=True):
            if self._context.stop.reason is not None:
                return None
            batch = to_device(batch, self._context.device)
            if self._exact:
                first = int(request.samples[0])
                seed_everything(derive_seed("evaluation", self._context.spec.seed, "at", first))
            if measure:
                self._add(done, model, request, batch)
            if predictions is not None:
                with self._precision():
                    predictions.add(model, batch, len(request.samples))
        return done

    def _add(self, done: _Pass, model: torch.nn.Module, request: Request, batch: Any) -> None:
        with self._precision():
            metrics = self._context.task.evaluate(model, batch)
        if not isinstance(metrics, Mapping):
            raise DtrainError(
                f"{self._origin} returned {described(metrics)}; return a dict of metrics by name",
                code="eval.not-metrics",
            )
        for name, value in metrics.items():
            if isinstance(value, MetricState):
                done.add_state(value)
                continue
            total, weight = read_loss(value, len(request.samples), f"{self._origin}[{name!r}]")
            tally = done.tallies.setdefault(name, _Tally())
            tally.totals.append(in_fp64(total))
            tally.weights.append(in_fp64(weight))

    def _combine(self, done: _Pass | None) -> dict[str, float] | None:
        """Exchange the sums once; every rank then adds the same numbers in the same order."""
        mine = None
        if done is not None:
            sums = {
                name: (self._sums(tally.totals), self._sums(tally.weights))
                for name, tally in done.tallies.items()
            }
            mine = sums, done.states.parts()
        everyone = collectives.gather_to_all((mine, len(self._requests)))
        shares: dict[int, dict[str, tuple[list[float], list[float]]]] = {}
        states = Sums()
        for rank, (share, num_batches) in enumerate(everyone):
            if share is None:
                return None
            if num_batches > 0:  # a rank without samples has no names to agree on
                shares[rank] = share[0]
            states.merge(share[1])
        _check_names(shares)
        found = {
            name: _quotient(
                name,
                _sum([x for share in shares.values() for x in share[name][0]]),
                _sum([x for share in shares.values() for x in share[name][1]]),
            )
            for name in shares[0]
        }
        idle = any(num_batches == 0 for _, num_batches in everyone)
        return found | self._of_states(done, states, idle=idle)

    def _of_states(self, done: _Pass | None, total: Sums, *, idle: bool) -> dict[str, float]:
        """Return the metrics of states that were added up over all ranks.

        Args:
            done: what this rank has computed.
            total: the sums over all ranks.
            idle: whether a rank has no samples; it gets the metrics from another.
        """
        state = None if done is None else done.state
        mine = None if state is None else state.results(total.totals())
        if total and idle:
            everyone = collectives.gather_to_all(mine)
            mine = next((each for each in everyone if each is not None), None)
        return mine or {}

    def _sums(self, values: list[float | torch.Tensor]) -> list[float]:
        """Return what the other ranks need: under `exact` every value, otherwise their sum."""
        on_device = [value for value in values if isinstance(value, torch.Tensor)]
        numbers = [value for value in values if not isinstance(value, torch.Tensor)]
        if on_device:
            numbers += torch.stack(on_device).tolist()  # the only wait for the device
        return numbers if self._exact else [_sum(numbers)]


def _batch_size(context: TrainContext) -> int | None:
    spec = context.spec
    exact = spec.strategy == "exact"
    parts = spec.train.virtual_shards if exact else context.ranks.world_size
    share = -(-spec.train.global_batch_size // parts)
    return spec.eval.batch_size or spec.train.micro_batch_size or share


def _check_names(shares: Mapping[int, Mapping[str, object]]) -> None:
    names = [set(share) for share in shares.values()]
    different = set[str]().union(*names) - names[0].intersection(*names)
    if different:
        ranks = [rank for rank, share in shares.items() if different & set(share)]
        raise DtrainError(
            f"evaluate() returned {', '.join(sorted(different))} on ranks {ranks} only; every "
            "rank must return the same metrics (with Loss(sum, weight=0) where there is none)",
            code="eval.metrics-differ",
        )


def _sum(numbers: list[float]) -> float:
    """Return the sum, rounded once, so that the order does not matter."""
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # beyond 1e308, or infinities of both signs
        return sum(numbers)


def _quotient(name: str, total: float, weight: float) -> float:
    if weight == 0:
        logger.warning("metric %s has no weight in the whole evaluation: it is nan", name)
        return math.nan
    return total / weight
