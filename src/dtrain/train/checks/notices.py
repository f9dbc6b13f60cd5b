"""What is no error, and yet not what one process would do: said once, with what to do.

A warning of rank 0 and an event each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch.nn.modules.batchnorm import _NormBase

from dtrain.train import collectives
from dtrain.train.checkpoint.state import plain_name
from dtrain.train.checks import digest
from dtrain.train.context import TrainContext
from dtrain.train.metrics.events import Events
from dtrain.train.tracing import perturb
from dtrain.words import few, numbered

logger = logging.getLogger(__name__)

_COPIED = ("ddp", "fsdp")
"""Strategies that give every rank the first one's buffers after each step."""


def tell_batch_norm(model: torch.nn.Module, context: TrainContext, events: Events) -> None:
    """Say that a BatchNorm normalises over a part of the step's samples, where it does."""
    strategy = context.spec.strategy
    replicas = context.local_devices if strategy == "dp" else context.ranks.world_size
    names = perturb.batch_norms(model, training=True)
    if strategy not in (*_COPIED, "dp") or replicas < 2 or not names:
        return
    names = [plain_name(name) for name in names]
    events.write("batch_norm", modules=names, parts=replicas)
    if not context.ranks.is_rank_zero:
        return
    logger.warning(
        "BatchNorm (%s) normalises over each %s's own samples, so that the training depends on "
        "their number, %d: %s",
        few(names, 5), "replica" if strategy == "dp" else "process", replicas,
        remedy(strategy, context.device.type, of_keras=perturb.is_of_keras(model)),
    )  # fmt: skip


def remedy(strategy: str, device: str, *, of_keras: bool = False) -> str:
    if of_keras:  # whose `synchronized=True` is for TensorFlow only
        return (
            "use a norm over features (LayerNormalization, GroupNormalization), or strategy 'exact'"
        )
    norm = "a norm over features (GroupNorm, LayerNorm), or strategy 'exact'"
    if device == "cpu":
        return f"use {norm} (torch's SyncBatchNorm works on GPUs only)"
    convert = "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) in model()"
    moved = "strategy 'ddp' and " if strategy == "dp" else ""
    return f"use {moved}{convert}; or {norm}"


class BufferWrites:
    """Finds buffers that some ranks change in a step, and others do not.

    All ranks are given the first one's buffers after each step, so the others' writes are lost.
    Where all ranks write, as BatchNorm does, that is known and nothing is said; and nothing is
    asked of ranks without samples.
    """

    def __init__(self, model: torch.nn.Module, events: Events, context: TrainContext) -> None:
        self._model = model
        self._events = events
        self._rank = context.ranks.rank
        self._norms = {id(m) for m in model.modules() if isinstance(m, _NormBase)}
        self._told: set[str] = set()
        self._idle = False
        self._before: dict[str, int] | None = None
        self._written: list[str] = []
        self.needed = context.spec.strategy in _COPIED and bool(self._buffers())
        """Whether there is anything to look at."""

    def begin(self, *, idle: bool) -> None:
        self._idle, self._written = idle, []
        self._before = self._digests()

    def before_update(self) -> None:
        """After its last forward, before ranks are given other buffers."""
        if self._before is not None:
            now = self._digests()
            self._written = [name for name, each in self._before.items() if now.get(name) != each]

    def end(self, step: int) -> None:
        """After a step, on all ranks; says what was found."""
        if self._before is None:
            return
        self._before = None
        everyone = collectives.gather_to_all(None if self._idle else self._written)
        active = [rank for rank, written in enumerate(everyone) if written is not None]
        names = {name: None for written in everyone for name in written or ()}
        alike: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            writers = tuple(rank for rank in active if name in (everyone[rank] or ()))
            if len(writers) < len(active) and name not in self._told:
                alike.setdefault(writers, []).append(name)
        for writers, found in alike.items():
            self._told.update(found)
            self._tell(step, found, writers, [rank for rank in active if rank not in writers])

    def _tell(
        self, step: int, names: list[str], writers: Iterable[int], others: Iterable[int]
    ) -> None:
        lost = [rank for rank in writers if rank != 0]
        self._events.write(
            "buffer_of_some_ranks", step=step, buffers=names, ranks=list(writers), lost=lost
        )
        if self._rank != 0:
            return
        end = f"what {numbered('rank', lost)} wrote is lost" if lost else "its write is everybody's"
        logger.warning(
            "in step %d %s changed the buffer %s, and %s did not. After each step all ranks are "
            "given rank 0's buffers: %s. A buffer is to be changed on all ranks alike",
            step, numbered("rank", writers), few(names, 5), numbered("rank", others), end,
        )  # fmt: skip

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {
            plain_name(f"{prefix}.{name}" if prefix else name): buffer
            for prefix, module in self._model.named_modules()
            if id(module) not in self._norms
            for name, buffer in module.named_buffers(recurse=False)
        }

    def _digests(self) -> dict[str, int]:
        buffers = self._buffers()
        return dict(zip(buffers, digest.of_each(buffers.values()), strict=True))


class Unused:
    """Tells which parameters the first step, and a whole epoch, left without a gradient.

    Costs nothing once every parameter has had one.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], events: Events, *, active: bool
    ) -> None:
        self._waiting = {name: each for name, each in parameters.items() if each.requires_grad}
        self._events = events
        self._active = active
        self._first = True

    def step(self, step: int, *, ends_epoch: bool) -> None:
        """After a step's backward, while its gradients are there."""
        if not self._waiting or not self._active:
            return
        self._waiting = {n: p for n, p in self._waiting.items() if p.grad is None}
        names = list(self._waiting)
        if names and self._first:
            self._tell(step, names, "step", "no sample of this step used them")
        if names and ends_epoch:
            self._tell(
                step, names, "epoch", "no sample has used them so far; they stay as they are"
            )
            self._waiting = {}
        self._first = False

    def _tell(self, step: int, names: list[str], over: str, meaning: str) -> None:
        shown = few(names, 8)
        logger.warning("parameters without a gradient after step %d: %s (%s)", step, shown, meaning)
        self._events.write("unused_parameters", step=step, over=over, parameters=names)
