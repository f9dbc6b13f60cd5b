"""One optimizer step, from a global batch's micro-batches to new parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.job.spec import TrainSpec
from dtrain.train.checks.finite import FiniteGuard
from dtrain.train.checks.train_state import TrainState
from dtrain.train.data.loader import to_device
from dtrain.train.loss import LossModule, in_fp64
from dtrain.train.precision import Precision
from dtrain.train.strategies.base import Pending, Strategy


@dataclass
class Parts:
    """What is trained: the user's model and optimizer, and what goes with them."""

    model: torch.nn.Module
    loss: LossModule
    """The task's loss over the model: what strategies wrap."""
    optimizer: torch.optim.Optimizer
    scheduler: Any | None
    scaler: torch.amp.GradScaler | None
    """Only with fp16."""

    def subject(
        self, numbers: Callable[[], Mapping[str, Any]], kept: Callable[[], Mapping[str, Any]]
    ) -> TrainState:
        """What of it is compared between ranks, with further numbers, and what the task keeps."""
        return TrainState(self.model, self.optimizer, self.scheduler, self.scaler, numbers, kept)


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know once a step is done."""

    loss: float
    """Sum over everyone's sums / sum of everyone's weights, before the step."""
    signals: tuple[float, ...]
    """The sums over all ranks of the `signals` that the caller gave."""
    grad_norm: torch.Tensor | None
    """2-norm of the reduced gradient before clipping; None without clipping."""
    skipped: bool
    """The gradient was not finite, so neither optimizer nor scheduler stepped."""


class TrainStep:
    """Forward, backward, reduce, clip, update: once per global batch, on every rank."""

    def __init__(
        self,
        parts: Parts,
        strategy: Strategy,
        spec: TrainSpec,
        device: torch.device,
        guard: FiniteGuard,
    ) -> None:
        self._parts = parts
        self._guard = guard
        self._strategy = strategy
        self._device = device
        self._clip = spec.clip_grad_norm
        self.precision = Precision(spec.precision, device)
        # The factor that undoes the reduction's mean goes into the loss, where it costs nothing;
        # with fp16 it would make W ranks overflow W times sooner than one, so there it comes after.
        early = parts.scaler is None
        self._loss_scale = strategy.gradient_scale if early else 1.0
        self._gradient_scale = 1.0 if early else strategy.gradient_scale
        self._all = list(parts.model.parameters())

    def __call__(
        self,
        batches: Iterable[tuple[int, Any]],
        num_batches: int,
        global_size: int,
        signals: tuple[float, ...],
    ) -> StepOutcome:
        """Train on one global batch.

        Args:
            batches: this rank's micro-batches as (number of samples, batch); none for a rank
                without samples.
            num_batches: how many there are.
            global_size: samples of all ranks in this step.
            signals: numbers of this rank that everyone wants the sum of, at no extra cost.

        Raises:
            DtrainError: the weights of the whole global batch add up to nothing.
        """
        self._parts.optimizer.zero_grad(set_to_none=True)
        for parameter in self._all:  # some may be in no group yet
            parameter.grad = None
        pending = self._accumulate(batches, num_batches, global_size, signals)
        self._strategy.finish_backward()
        total, weight, *heard = pending.wait()
        if not weight > 0:
            raise DtrainError(
                f"the loss weights of a whole global batch add up to {weight:g}: there is nothing "
                "to divide by. loss() must return Loss weights that are positive in sum"
            )
        loss = total / weight
        norm, skipped = self._update(self._gradient_scale * global_size / weight, loss)
        self._strategy.finish_step()
        return StepOutcome(loss, tuple(heard), norm, skipped)

    def _accumulate(
        self,
        batches: Iterable[tuple[int, Any]],
        num_batches: int,
        global_size: int,
        signals: tuple[float, ...],
    ) -> Pending:
        """Add up the gradients of all micro-batches; the losses' sum runs under the last one."""
        scale = self._loss_scale / global_size
        sum_so_far: float | torch.Tensor = 0.0
        weight_so_far: float | torch.Tensor = 0.0
        pending: Pending | None = None
        for index, (num_samples, batch) in enumerate(batches):
            last = index == num_batches - 1
            batch = to_device(batch, self._device)
            with self.precision():
                loss_sum, weight = self._strategy.loss(batch, num_samples, last=last)
            sum_so_far = sum_so_far + in_fp64(loss_sum)
            weight_so_far = weight_so_far + in_fp64(weight)
            self._guard.note(loss_sum)
            if last:
                pending = self._strategy.start_sum((sum_so_far, weight_so_far, *signals))
            if self._parts.scaler is not None:
                loss_sum = self._parts.scaler.scale(loss_sum)
            # as the gradient to begin with, which is 25 µs cheaper than a product in the graph
            loss_sum.backward(torch.full_like(loss_sum, scale))
        return pending or self._strategy.start_sum((0.0, 0.0, *signals))

    def _update(self, correction: float, loss: float) -> tuple[torch.Tensor | None, bool]:
        """Clip and step. Returns the norm before clipping and whether the step was left out."""
        scaler, optimizer = self._parts.scaler, self._parts.optimizer
        if scaler is not None:
            scaler.unscale_(optimizer)
        # groups may be added while training
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        if correction != 1.0:
            grads = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(grads, correction)
        norm = None
        if self._clip is not None:
            norm = self._strategy.clip_gradients(parameters, self._clip)
        if not self._guard.accepts(loss, norm):
            return norm, True
        if scaler is None:
            optimizer.step()
            skipped = False
        else:
            skipped = self._scaled_step(scaler)
        if self._parts.scheduler is not None and not skipped:
            self._parts.scheduler.step()
        return norm, skipped

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> bool:
        """Step unless the gradient overflowed. The reduced gradient, and so the verdict, is the
        same on every rank."""
        before = scaler.get_scale()
        scaler.step(self._parts.optimizer)
        scaler.update()
        return bool(scaler.get_scale() < before)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler that fp16 needs; None otherwise."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
