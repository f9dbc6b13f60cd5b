"""How values that processes have logged become one: by their mean, sum, smallest or largest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dtrain.integrations.lightning.compat import ResultCollection, pl
from dtrain.train import collectives

Part = tuple[str, float, float]
"""Of one process: the kind of reduction, the value (of a mean: the sum) and its weight."""
_KINDS = ("mean", "sum", "max", "min")


class QuietResults(ResultCollection):
    """What a module logs, read from the device only when somebody wants to see it.

    Lightning reads what is logged with `prog_bar=True` after every batch, also where no progress
    bar is there to show it.
    """

    def __init__(self, training: bool, trainer: pl.Trainer) -> None:
        super().__init__(training=training)
        self._trainer = trainer

    def metrics(self, on_step: bool) -> Any:
        """See Lightning; without those of the bar where there is none."""
        if self._trainer.progress_bar_callback is not None:
            return super().metrics(on_step)
        of_bar = [each.meta for each in self.values() if each.meta.prog_bar]
        for meta in of_bar:
            meta.prog_bar = False
        try:
            return super().metrics(on_step)
        finally:
            for meta in of_bar:
                meta.prog_bar = True


def kind_of(metric: Any) -> str:
    """How values of one of Lightning's results are put together; it refuses others itself."""
    return next(kind for kind in _KINDS if getattr(metric.meta, f"is_{kind}_reduction"))


def together(everyone: Iterable[Mapping[str, Part]]) -> dict[str, tuple[float, float]]:
    """By name the value and its weight over all processes; of a mean the sum."""
    found: dict[str, tuple[float, float]] = {}
    for theirs in everyone:
        for name, (kind, value, weight) in theirs.items():
            if name not in found:
                found[name] = value, weight
            elif kind == "max":
                found[name] = max(found[name][0], value), 1.0
            elif kind == "min":
                found[name] = min(found[name][0], value), 1.0
            else:
                found[name] = found[name][0] + value, found[name][1] + weight
    return found


def of_step(
    results: Any, samples: float, more: Mapping[str, Part] | None = None
) -> dict[str, float]:
    """What all processes have logged in a step, by the names of Lightning's loggers.

    The values are read from the device here, so only where a line is written. Called by all ranks.

    Args:
        results: Lightning's, of the training loop.
        samples: of this process in its last batch.
        more: of this process, in place of results of the same name.
    """
    mine: dict[str, Part] = {**(more or {})}
    for name, metric in _shown(results, on_step=True):
        value = metric._forward_cache
        if name not in mine and value is not None and value.numel() == 1:
            kind = kind_of(metric) if metric.is_tensor else "mean"
            weight = samples if kind == "mean" else 1.0
            mine[name] = kind, float(value) * weight, weight
    everyone = collectives.gather_to_all(mine)
    kinds = {name: part[0] for theirs in everyone for name, part in theirs.items()}
    return {
        name: value / weight if kinds[name] == "mean" else value
        for name, (value, weight) in together(everyone).items()
        if weight
    }


def of_epoch(results: Any) -> dict[str, float]:
    """What is logged for an epoch that has ended, over all processes. Called by all ranks."""
    mine: dict[str, float] = {}
    for name, metric in _shown(results, on_step=False):
        value = results._get_cache(metric, False)
        if value is not None and value.numel() == 1:
            mine[name] = float(value)
    found: dict[str, list[float]] = {}
    for theirs in collectives.gather_to_all(mine):
        for name, value in theirs.items():
            found.setdefault(name, []).append(value)
    return {name: _mean(values) for name, values in found.items()}


def _mean(values: list[float]) -> float:
    """Where the processes agree already, just that."""
    return values[0] if len({*values}) == 1 else math.fsum(values) / len(values)


def _shown(results: Any, *, on_step: bool) -> Iterator[tuple[str, Any]]:
    """Results that are for a logger or a progress bar, by the name that they have there."""
    for _, metric in results.valid_items():
        meta = metric.meta
        asked = meta.on_step if on_step else meta.on_epoch
        if asked and (meta.logger or meta.prog_bar):
            yield results._forked_name(metric, on_step)[1], metric
