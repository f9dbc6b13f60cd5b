"""Warnings about training that differs from that of one process without being an error.

Each is given once, with a remedy: as a warning on rank 0 and as an event.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch.nn.modules.batchnorm import _NormBase

from dtrain.train import collectives, digest
from dtrain.train.checkpoint.state import plain_name
from dtrain.train.context import TrainContext
from dtrain.train.metrics.events import Events
from dtrain.train.tracing import perturb
from dtrain.words import few, numbered

logger = logging.getLogger(__name__)

_COPIED = ("ddp", "fsdp")
"""The strategies that copy the first rank's buffers to all ranks after each step."""


def warn_of_batch_norm(model: torch.nn.Module, context: TrainContext, events: Events) -> None:
    """Warn if a BatchNorm normalises over only a part of the step's samples."""
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
        "BatchNorm (%s) normalises over each %s's own samples, so the training depends on "
        "their number, %d: %s",
        few(names, 5), "replica" if strategy == "dp" else "process", replicas,
        remedy(strategy, context.device.type, of_keras=perturb.is_of_keras(model)),
    )  # fmt: skip


def warn_of_param_dtype(context: TrainContext, events: Events) -> None:
    """Warn if FSDP rounds parameters, which no other strategy does."""
    dtype = context.spec.fsdp.param_dtype
    if not context.shards_model or dtype in (None, "fp32"):
        return
    events.write("param_dtype", dtype=dtype)
    if context.ranks.is_rank_zero:
        logger.warning(
            "fsdp.param_dtype: %s rounds parameters, inputs and gradients in forward and backward, "
            "so it is another training than under other strategies. train.precision: bf16 is "
            "(nearly) the same under all",
            dtype,
        )


def remedy(strategy: str, device: str, *, of_keras: bool = False) -> str:
    if of_keras:  # Keras's `synchronized=True` is for TensorFlow only
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

    After each step the first rank's buffers are copied to all ranks, so the writes of the others
    are lost. If all ranks write, as with BatchNorm, this is expected and not reported. Ranks
    without samples are ignored.
    """

    def __init__(self, model: torch.nn.Module, events: Events, context: TrainContext) -> None:
        self._model = model
        self._events = events
        self._rank = context.ranks.rank
        self._norms = {id(m) for m in model.modules() if isinstance(m, _NormBase)}
        self._reported: set[str] = set()
        self._idle = False
        self._before: dict[str, int] | None = None
        self._written: list[str] = []
        self.needed = context.spec.strategy in _COPIED and bool(self._buffers())
        """Whether the model has buffers to check."""

    def begin(self, *, idle: bool) -> None:
        self._idle, self._written = idle, []
        self._before = self._digests()

    def before_update(self) -> None:
        """Record this rank's writes after its last forward, before its buffers are replaced."""
        if self._before is not None:
            now = self._digests()
            self._written = [name for name, each in self._before.items() if now.get(name) != each]

    def end(self, step: int) -> None:
        """Report what was found in a step. All ranks must call it."""
        if self._before is None:
            return
        self._before = None
        everyone = collectives.gather_to_all(None if self._idle else self._written)
        active = [rank for rank, written in enumerate(everyone) if written is not None]
        names = {name: None for written in everyone for name in written or ()}
        by_writers: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            writers = tuple(rank for rank in active if name in (everyone[rank] or ()))
            if len(writers) < len(active) and name not in self._reported:
                by_writers.setdefault(writers, []).append(name)
        for writers, found in by_writers.items():
            self._reported.update(found)
            self._report(step, found, writers, [rank for rank in active if rank not in writers])

    def _report(
        self, step: int, names: list[str], writers: Iterable[int], others: Iterable[int]
    ) -> None:
        lost = [rank for rank in writers if rank != 0]
        self._events.write(
            "buffer_of_some_ranks", step=step, buffers=names, ranks=list(writers), lost=lost
        )
        if self._rank != 0:
            return
        end = f"what {numbered('rank', lost)} wrote is lost" if lost else "all get what it wrote"
        logger.warning(
            "in step %d %s changed the buffer %s, and %s did not. After each step all ranks get "
            "rank 0's buffers: %s. Change a buffer in the same way on all ranks",
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
    """Reports the parameters that the first step, or a whole epoch, left without a gradient.

    It costs nothing once every parameter has had one.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], events: Events, *, active: bool
    ) -> None:
        self._waiting = {name: each for name, each in parameters.items() if each.requires_grad}
        self._events = events
        self._active = active
        self._first = True

    def step(self, step: int, *, ends_epoch: bool) -> None:
        """Check the gradients of a step, after its backward and before they are cleared."""
        if not self._waiting or not self._active:
            return
        self._waiting = {n: p for n, p in self._waiting.items() if p.grad is None}
        names = list(self._waiting)
        if names and self._first:
            self._report(step, names, "step", "no sample of this step used them")
        if names and ends_epoch:
            self._report(
                step, names, "epoch", "no sample has used them so far; they stay as they are"
            )
            self._waiting = {}
        self._first = False

    def _report(self, step: int, names: list[str], over: str, meaning: str) -> None:
        shown = few(names, 8)
        logger.warning("parameters without a gradient after step %d: %s (%s)", step, shown, meaning)
        self._events.write("unused_parameters", step=step, over=over, parameters=names)
