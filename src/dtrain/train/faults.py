"""Faults that are made on purpose on one rank (`dtrain launch --inject`), to test the checks."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dtrain.errors import BlamedError, UsageError
from dtrain.job.faults import TENSOR_KINDS, Injection, parse_injection
from dtrain.task import Loss, Task
from dtrain.train import collectives, digest
from dtrain.train.checkpoint.state import plain_name
from dtrain.train.checks.collective_trace import CHAIN
from dtrain.train.checks.train_state import BUFFERS, GRADIENTS, MOMENTS, PARAMETERS, TrainState
from dtrain.train.context import TrainContext
from dtrain.train.data.exactly_once import Split
from dtrain.train.data.fetch import Request
from dtrain.train.data.pipeline import Feed, Watch
from dtrain.train.data.placement import Position
from dtrain.words import few

logger = logging.getLogger(__name__)

_TARGETS = {
    "gradient": GRADIENTS,
    "parameter": PARAMETERS,
    "moment": MOMENTS,
    "buffer": BUFFERS,
}


class NeverMadeError(BlamedError):
    """A fault was requested, but the training had nothing that it applies to."""

    code = "inject.never-made"


class Injector:
    """The faults of this rank. Each is made once in a process.

    Args:
        context: the context of the training. Faults are made only in its first start, so a resumed
            or restarted run has none.
    """

    def __init__(self, context: TrainContext) -> None:
        first = context.attempt == 0 and context.ranks.restart == 0
        texts = context.spec.checks.inject if first else []
        faults = [parse_injection(text) for text in texts]
        for fault in faults:
            if fault.rank >= context.ranks.world_size:
                raise UsageError(
                    f"--inject: rank {fault.rank} is not one of {context.ranks.world_size}",
                    code="plan.absent-rank",
                )
        self._faults = faults
        self._rank = context.ranks.rank
        self._waiting = [fault for fault in faults if fault.rank == self._rank]
        self._step = 0
        self._names: list[str] = []

    def seeded(self, context: TrainContext) -> TrainContext:
        """Return the context, with another seed if that is the fault."""
        if not self._take(lambda each: each.kind == "seed"):
            return context
        return replace(
            context, spec=context.spec.model_copy(update={"seed": context.spec.seed + 1})
        )

    def begin(self, task: Task, subject: TrainState, total_steps: int | None) -> None:
        """Install the hooks that make faults, before the first step.

        Raises:
            UsageError: a fault cannot be made in this training; raised on all ranks.
        """
        _refuse_impossible(self._faults, subject, total_steps)
        if not self._waiting:
            return
        self._names = [name for name, _ in subject.model.named_parameters()]
        self._watch_loss(task)
        subject.before_updates(functools.partial(self._before_update, subject))
        for fault in self._waiting:
            if fault.kind in ("skip-collective", "swap-collectives"):
                CHAIN.fault_hook = _ChangedCollective(self, fault.kind)

    def between_steps(self, subject: TrainState, next_step: int) -> None:
        """Make the faults in tensors that outlive a step, then begin the next step.

        `next_step` is counted from 1.
        """
        self._change_tensors(subject, gradients=False)
        self._step = next_step

    def end(self, subject: TrainState, last_step: int) -> None:
        """Raise on all ranks, after the last step, if a fault was never made on some rank."""
        if not self._faults:
            return
        self.between_steps(subject, last_step + 1)
        CHAIN.fault_hook = None
        _refuse_unmade(self._waiting, last_step, self._rank)

    def requests(self, feed: Feed, step: int, position: Position, split: Split) -> Watch:
        """Return an iterator function for data requests, which changes one if that is a fault."""
        kinds = ("duplicate-sample", "drop-sample")
        faults = {fault.step: fault for fault in self._waiting if fault.kind in kinds}
        if not faults:
            return iter
        if not feed.rereadable:
            raise UsageError(
                "--inject: the samples of a stream cannot be changed", code="inject.impossible"
            )

        def changed(requests: Iterable[Request]) -> Iterator[Request]:
            source = iter(requests)
            for batch in feed.course.batches(step, position):
                for index, _ in enumerate(split(batch)):
                    request = next(source)
                    fault = faults.get(batch.step + 1) if index == 0 else None
                    if fault is not None and fault in self._waiting:
                        request = _other_samples(fault, request)
                        self._done(fault)
                    yield request

        return changed

    # -- making the faults -------------------------------------------------------------------

    def due(self, kind: str) -> bool:
        """Return whether a fault of this kind is due now; True only once per fault."""
        return bool(self._take(lambda each: each.kind == kind and each.step == self._step))

    def _take(self, wanted: Callable[[Injection], bool]) -> list[Injection]:
        found = [fault for fault in self._waiting if wanted(fault)]
        for fault in found:
            self._done(fault)
        return found

    def _done(self, fault: Injection) -> None:
        self._waiting = [each for each in self._waiting if each is not fault]
        logger.warning("injected the fault %s in step %d", fault.kind, fault.step)

    def _change_tensors(self, subject: TrainState, *, gradients: bool) -> None:
        for fault in self._take(
            lambda each: (
                each.kind in TENSOR_KINDS
                and each.step == self._step
                and (each.target == "gradient") == gradients
            )
        ):
            _tamper_tensor(fault, subject)

    def _before_update(self, subject: TrainState) -> None:
        self._change_tensors(subject, gradients=True)
        if self.due("lr"):
            for optimizer in subject.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 1.1

    def _watch_loss(self, task: Task) -> None:
        method = task.loss

        def loss(model: torch.nn.Module, batch: Any) -> Any:
            value = method(model, batch)
            if not torch.is_grad_enabled():
                return value
            if self.due("nan-loss"):
                value = _changed_loss(value, lambda total: total * float("nan"))
            for fault in self._waiting:  # not removed: the search for the cause computes it again
                if fault.kind == "nan-gradient" and fault.step == self._step:
                    zero = _NaNBackward.apply(self._parameter(fault, model), fault.element)
                    value = _changed_loss(value, zero.add)
            return value

        vars(task)["loss"] = loss

    def _parameter(self, fault: Injection, model: torch.nn.Module) -> torch.Tensor:
        """Return the parameter as a tensor of this model: replicas of `dp` have plain tensors."""
        for name in self._names:
            if _is_named(plain_name(name), fault.param):
                found: torch.Tensor = functools.reduce(getattr, name.split("."), model)
                if digest.local(found).numel():
                    return found
        raise _error(fault, "this rank holds no part of it")


class _NaNBackward(torch.autograd.Function):
    """Adds nothing in forward; in backward, NaN to one element of this rank's gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, element: int) -> torch.Tensor:
        ctx.zeros, ctx.element = torch.zeros_like(parameter), element
        return digest.local(parameter).new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = digest.local(ctx.zeros).view(-1)
        flat[min(ctx.element, len(flat) - 1)] = float("nan")
        return ctx.zeros, None


class _ChangedCollective:
    """Skips a collective of the task, or swaps it with the next one."""

    def __init__(self, injector: Injector, kind: str) -> None:
        self._injector = injector
        self._kind = kind
        self._held: Callable[[], Any] | None = None

    def __call__(self, users: bool, call: Callable[[], Any]) -> Any:
        if not users:
            return call()
        if self._held is not None:
            held, self._held = self._held, None
            result = call()
            held()
            return result
        if self._injector.due(self._kind):
            if self._kind == "swap-collectives":
                self._held = call
            return None
        return call()


def _changed_loss(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, Loss):
        return Loss(change(value.sum), value.weight)
    return change(value)


def _tamper_tensor(fault: Injection, subject: TrainState) -> None:
    """Change the tensor that the fault names, or the first tensor that the fault can change."""
    tensors = subject.tensors(_TARGETS[fault.target])
    wanted = {name: each for name, each in tensors.items() if _is_named(name, fault.param)}
    for tensor in wanted.values():
        if _tampered(fault, digest.local(tensor)):
            return
    what = f"{fault.param!r} among " if fault.param else ""
    raise UsageError(
        f"--inject {fault.kind}: changes nothing in {what}{', '.join(list(tensors)[:8]) or 'none'}",
        code="inject.impossible",
    )


def _tampered(fault: Injection, tensor: torch.Tensor) -> bool:
    if tensor.numel() < 2:  # for example Adam's counters
        return False
    flat, first = tensor.view(-1), fault.element
    before = digest.as_integers(flat).clone()
    if fault.action == "scale":
        if flat.is_floating_point():
            flat *= 1 + 1e-6
    elif fault.action == "swap":
        unequal = (before[first:-1] != before[first + 1 :]).nonzero()
        if len(unequal):
            first += int(unequal[0])
            flat[[first, first + 1]] = flat[[first + 1, first]]
    elif fault.bit is not None and first < len(before):
        digest.as_integers(flat)[first] ^= 1 << fault.bit
    elif len(filled := flat[first:].nonzero()):
        digest.as_integers(flat)[first + int(filled[0])] ^= 1 << _highest_mantissa_bit(flat)
    return not torch.equal(before, digest.as_integers(flat))


def _highest_mantissa_bit(tensor: torch.Tensor) -> int:
    """Return the highest bit of the mantissa: a low bit may be lost by rounding before a check."""
    if not tensor.is_floating_point():
        return 0
    return -int(math.log2(torch.finfo(tensor.dtype).eps)) - 1


def _other_samples(fault: Injection, request: Request) -> Request:
    if fault.kind == "drop-sample":
        return replace(request, samples=request.samples[:-1])
    samples = request.samples.copy()
    samples[-1] = samples[0]
    return replace(request, samples=samples)


def _refuse_impossible(
    faults: Sequence[Injection], subject: TrainState, total_steps: int | None
) -> None:
    """Raise if a fault is impossible. Every rank checks the faults of all ranks."""
    for fault in faults:
        if total_steps is not None and fault.step > total_steps:
            raise _error(
                fault,
                f"step {fault.step} is beyond the last, {total_steps}",
                code="job.fault-after-the-end",
            )
        if fault.kind == "nan-gradient" or fault.kind in TENSOR_KINDS:
            _refuse_target(fault, subject)


def _refuse_unmade(waiting: Sequence[Injection], last_step: int, rank: int) -> None:
    """Raise, at the end of a training, if a fault was not made on some rank."""
    everyone = collectives.gather_to_all([_unmade(fault, last_step) for fault in waiting])
    lines = [line for theirs in everyone for line in theirs]
    if lines:
        culprits = [number for number, theirs in enumerate(everyone) if theirs]
        raise NeverMadeError("\n".join(lines), culprits, rank)


def _refuse_target(fault: Injection, subject: TrainState) -> None:
    tensors: Mapping[str, torch.Tensor] = subject.parameters()
    what = "parameter"
    if fault.kind in TENSOR_KINDS and fault.target == "buffer":
        tensors, what = dict(subject.model.named_buffers()), "buffer"
        if not tensors:
            raise _error(fault, "the model has no buffers")
    found = [each for name, each in tensors.items() if _may_be(name, fault)]
    if not found:
        listed = few(tensors, 8)
        raise _error(fault, f"there is no {what} {fault.param!r}; there are: {listed}")
    last = fault.element + (fault.kind in TENSOR_KINDS and fault.action == "swap")
    largest = max(each.numel() for each in found)
    if last >= largest:
        raise _error(
            fault, f"element {last} is not one of {fault.param or 'any ' + what}'s {largest}"
        )
    bits = max(8 * each.element_size() for each in found)
    if fault.bit is not None and fault.bit >= bits:
        raise _error(fault, f"bit {fault.bit} is not one of an element's {bits}")


def _may_be(name: str, fault: Injection) -> bool:
    """Return whether the fault names this parameter or buffer, or an optimizer tensor of it."""
    of_optimizer = "moment" in fault.kind and _is_named(str(fault.param), name)
    return _is_named(name, fault.param) or of_optimizer


def _is_named(name: str, param: str | None) -> bool:
    """Return whether `param` is the tensor of this name; None means any tensor."""
    return param is None or name == param or name.startswith(f"{param}.")


def _unmade(fault: Injection, last_step: int) -> str:
    why = f"step {fault.step} had nothing that it applies to"
    if fault.step > last_step:
        why = f"the training ended after step {last_step}"
    elif fault.kind in ("skip-collective", "swap-collectives"):
        why = f"the task called no collective itself in step {fault.step}"
    return f"--inject {fault.kind}: not injected on rank {fault.rank}: {why}"


def _error(fault: Injection, why: str, *, code: str = "inject.impossible") -> UsageError:
    return UsageError(f"--inject {fault.kind} on rank {fault.rank}: {why}", code=code)
