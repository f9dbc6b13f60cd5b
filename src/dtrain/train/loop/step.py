"""One optimizer step: from the micro-batches of a global batch to new parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dtrain.errors import DtrainError
from dtrain.job.spec import TrainSpec
from dtrain.train.checks.finite import FiniteGuard
from dtrain.train.data.loader import to_device
from dtrain.train.loss import LossModule, in_fp64
from dtrain.train.metrics.phases import PhaseClock
from dtrain.train.precision import Precision
from dtrain.train.strategies.base import Pending, Strategy
from dtrain.train.strategies.forwards import graphs


@dataclass
class Parts:
    """The objects that are trained: the user's model, its loss, optimizer and scheduler."""

    model: torch.nn.Module
    loss: LossModule
    """The task's loss over the model. Strategies wrap this module."""
    optimizer: torch.optim.Optimizer
    scheduler: Any | None
    scaler: torch.amp.GradScaler | None
    """The loss scaler of fp16; None with other precisions."""


class StepFlags(NamedTuple):
    """Numbers that a rank sends together with its losses; the outcome has their sums."""

    stop: float
    """The number of ranks that were asked to stop at the next step boundary."""
    save: float
    """Whether a checkpoint is due by the clock of rank 0."""
    end: float
    """The number of ranks on which a callback asked for the end of training."""
    writing: float
    """The number of ranks that are still writing a checkpoint."""
    write_failed: float
    """The number of ranks on which that has failed."""
    position: float
    """`GlobalBatch.fingerprint`, to check that all ranks did the same step."""
    compiled: float = 0.0
    """The number of ranks that compiled code since the forwards of the last step."""


@dataclass(frozen=True)
class StepOutcome:
    loss: float
    """The sum of all ranks' sums / the sum of all ranks' weights, before the step."""
    flags: StepFlags
    grad_norm: torch.Tensor | None
    """The 2-norm of the reduced gradient before clipping; None without clipping."""
    skipped: bool
    """Whether the gradient was not finite, so that neither optimizer nor scheduler stepped."""

    def metrics(self, lr: float) -> dict[str, float]:
        """Return the metrics of the step by name. `lr` is the learning rate of the step."""
        norm = {} if self.grad_norm is None else {"grad_norm": float(self.grad_norm)}
        return {"loss": self.loss, "lr": lr, **norm}


class TrainStep:
    """Runs forward, backward, reduction, clipping and update, once per global batch."""

    def __init__(
        self,
        parts: Parts,
        strategy: Strategy,
        spec: TrainSpec,
        device: torch.device,
        guard: FiniteGuard,
        phases: PhaseClock,
    ) -> None:
        self._parts = parts
        self._phases = phases
        self._guard = guard
        self._strategy = strategy
        self._device = device
        self._clip = spec.clip_grad_norm
        self.precision = Precision(spec.precision, device)
        # The factor that undoes the reduction's mean goes into the loss, where it costs nothing.
        # With fp16, W ranks would then overflow W times sooner than one, so it is applied later.
        early = parts.scaler is None
        self._loss_scale = strategy.gradient_scale if early else 1.0
        self._gradient_scale = 1.0 if early else strategy.gradient_scale
        self._all = list(parts.model.parameters())
        self._compiles = spec.compile
        self._graphs = graphs() if spec.compile else 0
        """The number of compiled graphs when it was last looked up."""

    def __call__(
        self,
        batches: Iterable[tuple[int, Any]],
        num_batches: int,
        global_size: int,
        flags: StepFlags,
    ) -> StepOutcome:
        """Train on one global batch.

        Args:
            batches: this rank's micro-batches as (number of samples, batch); none for a rank
                without samples.
            num_batches: the number of micro-batches.
            global_size: the number of samples that all ranks have in this step.
            flags: the flags of this rank.

        Raises:
            DtrainError: the sum of the weights of the whole global batch is not positive.
        """
        self._parts.optimizer.zero_grad(set_to_none=True)
        for parameter in self._all:  # some may not be in a group yet
            parameter.grad = None
        pending = self._accumulate(batches, num_batches, global_size, flags)
        self._phases.enter("reduction")
        self._strategy.finish_backward()
        total, weight, *flag_sums = pending.wait()
        self._phases.enter("optimizer")
        if not weight > 0:
            raise DtrainError(
                f"the loss weights of a whole global batch add up to {weight:g}, and the loss is "
                "divided by that sum. loss() must return Loss weights with a positive sum",
                code="task.loss-weights-zero",
            )
        loss = total / weight
        norm, skipped = self._update(self._gradient_scale * global_size / weight, loss)
        self._strategy.finish_step()
        self._phases.enter("other")
        return StepOutcome(loss, StepFlags(*flag_sums), norm, skipped)

    def _accumulate(
        self,
        batches: Iterable[tuple[int, Any]],
        num_batches: int,
        global_size: int,
        flags: StepFlags,
    ) -> Pending:
        """Add up the gradients of all micro-batches.

        The losses are summed over the ranks during the last backward.
        """
        scale = self._loss_scale / global_size
        sum_so_far: float | torch.Tensor = 0.0
        weight_so_far: float | torch.Tensor = 0.0
        pending: Pending | None = None
        for index, (num_samples, batch) in enumerate(batches):
            last = index == num_batches - 1
            batch = to_device(batch, self._device)
            self._phases.enter("forward")
            with self.precision():
                loss_sum, weight = self._strategy.loss(batch, num_samples, last=last)
            sum_so_far = sum_so_far + in_fp64(loss_sum)
            weight_so_far = weight_so_far + in_fp64(weight)
            self._guard.note(loss_sum)
            if last:
                pending = self._strategy.start_sum(
                    (sum_so_far, weight_so_far, *self._with_compiled(flags))
                )
            if self._parts.scaler is not None:
                loss_sum = self._parts.scaler.scale(loss_sum)
            self._phases.enter("backward")
            # the scale is the initial gradient: 25 µs cheaper than a product in the graph
            loss_sum.backward(torch.full_like(loss_sum, scale))
            self._phases.enter("data")
        return pending or self._strategy.start_sum((0.0, 0.0, *self._with_compiled(flags)))

    def _with_compiled(self, flags: StepFlags) -> StepFlags:
        """Return the flags of this rank after the last forward of a step."""
        if not self._compiles:
            return flags
        before, self._graphs = self._graphs, graphs()
        return flags._replace(compiled=float(self._graphs > before))

    def _update(self, correction: float, loss: float) -> tuple[torch.Tensor | None, bool]:
        """Clip and step. Return the norm before clipping and whether the step was skipped."""
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
        """Step unless the gradient overflowed. Return whether the step was skipped.

        The reduced gradient is the same on every rank, and so is the result.
        """
        before = scaler.get_scale()
        scaler.step(self._parts.optimizer)
        scaler.update()
        return bool(scaler.get_scale() < before)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scaler that fp16 needs, or None for other precisions."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
