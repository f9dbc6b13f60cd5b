"""`dtrain.EMA`: an exponential moving average of the weights."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dtrain.callback import Callback
from dtrain.errors import DtrainError
from dtrain.train.checkpoint.state import is_sharded, load_model_state, model_state

_MADE: weakref.WeakSet[EMA] = weakref.WeakSet()
_NUMBERS = itertools.count()


class EMA(Callback):
    """An exponential moving average of a model's weights, made with torch's `AveragedModel`.

    The trainer updates it once after each optimizer step, and saves it in checkpoints. After the
    first step it equals the weights. After each later step it is
    `decay * average + (1 - decay) * weights`. There are two ways to use it:

    - `callbacks()` returns `[dtrain.EMA(decay=0.999)]`. Then `evaluate` and `predict` receive the
      averaged model.
    - The task keeps `self.ema = dtrain.EMA(model, 0.999)`, made in `model()` or `optimizer()`. It
      can use `self.ema.model` anywhere: in `evaluate`, or in `loss` as a teacher.

    Args:
        model: the task's model, or a part of it. None means the model that `model()` returns.
        decay: the fraction of the average that stays in each step, from 0 to 1.
        use_buffers: whether floating-point buffers, such as BatchNorm's statistics, are averaged
            too. If False, they are those of the model. Integer buffers are always those of the
            model.

    Raises:
        DtrainError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        decay: float = 0.999,
        *,
        use_buffers: bool = True,
    ) -> None:
        if model is not None and not isinstance(model, torch.nn.Module):
            raise DtrainError(
                f"dtrain.EMA({model!r}): the first argument is the model, for example "
                "dtrain.EMA(model, 0.999); in callbacks() write dtrain.EMA(decay=0.999)",
                code="ema.bad-argument",
            )
        if not 0 <= decay <= 1:
            raise DtrainError(
                f"dtrain.EMA: decay is {decay}; it must be a number from 0 to 1",
                code="ema.bad-argument",
            )
        self.decay = decay
        self.use_buffers = use_buffers
        self.source = model
        """The module that is averaged; None until it is known."""
        self._given = model is not None
        self._averaged: AveragedModel | None = None
        self.number = next(_NUMBERS)
        _MADE.add(self)

    @property
    def model(self) -> Any:
        """The averaged model, in `eval()` mode and without gradients. Call it, do not change it.

        Raises:
            DtrainError: there is no average yet, or the weights cannot be averaged.
        """
        return self._average().module

    def attach(self, model: torch.nn.Module) -> None:
        """Set the model whose average is evaluated in place of it. The trainer calls this.

        Raises:
            DtrainError: this object averages another model.
        """
        if not self._given and self.source is not model:
            self.source, self._averaged = model, None
        if self.source is not model:
            raise DtrainError(
                "callbacks() returned a dtrain.EMA of a part of the model, but the whole model is "
                "evaluated; keep that one in the task, and do not return it from callbacks()",
                code="ema.part-of-model",
            )

    def start(self) -> None:
        """Set the average to the current weights. The trainer calls this before the first step."""
        average = self._average()
        assert self.source is not None
        _refuse_parts(self.source)
        for mine, theirs in zip(_tensors(average.module), _tensors(self.source), strict=True):
            mine.data = theirs.detach().clone()
        average.n_averaged.zero_()

    def update(self) -> None:
        """Update the average. The trainer calls this after each optimizer step."""
        average = self._average()
        assert self.source is not None
        average.update_parameters(self.source)
        pairs = zip(average.module.buffers(), self.source.buffers(), strict=True)
        for mine, theirs in pairs:
            if not mine.is_floating_point():  # an average of counters would be truncated
                mine.copy_(theirs)

    def kept(self) -> dict[str, Any]:
        """Return the state for checkpoints."""
        average = self._average()
        return {"updates": int(average.n_averaged), "weights": model_state(average.module)}

    def load_kept(self, state: Mapping[str, Any]) -> None:
        """Load a state that `kept` returned.

        Raises:
            CheckpointError: the state belongs to another model.
        """
        average = self._average()
        load_model_state(average.module, state["weights"])
        average.n_averaged.fill_(state["updates"])

    def _average(self) -> AveragedModel:
        if self._averaged is not None:
            return self._averaged
        if self.source is None:
            raise DtrainError(
                "a dtrain.EMA that was made without a model has no model before training begins",
                code="ema.no-model-yet",
            )
        _refuse_parts(self.source)
        average = get_ema_multi_avg_fn(self.decay)
        try:
            made = AveragedModel(self.source, multi_avg_fn=average, use_buffers=self.use_buffers)
        except (RuntimeError, TypeError) as error:
            raise DtrainError(
                f"dtrain.EMA cannot copy the model: {error}", code="ema.cannot-copy"
            ) from error
        if list(model_state(made.module)) != list(model_state(self.source)):
            raise DtrainError(
                f"dtrain.EMA cannot copy the model: copy.deepcopy of a {type(self.source).__name__}"
                " holds other tensors, for example with a model of Keras",
                code="ema.cannot-copy",
            )
        self._averaged = made
        made.module.requires_grad_(False).eval()
        return made


def averages_of(model: torch.nn.Module) -> list[EMA]:
    """Return the averages of this model or of a part of it, sorted by when they were made."""
    parts = {id(module) for module in model.modules()}
    return sorted((e for e in _MADE if id(e.source) in parts), key=lambda each: each.number)


def _refuse_parts(model: torch.nn.Module) -> None:
    if is_sharded(model):
        raise DtrainError(
            "strategy 'fsdp' cuts the weights into one part per process, but dtrain.EMA needs "
            "whole weights; use strategy 'ddp' or 'exact'",
            code="ema.needs-whole-weights",
        )


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
