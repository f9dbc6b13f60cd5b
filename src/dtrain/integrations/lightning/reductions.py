"""Reductions of logged values over processes: mean, sum, minimum or maximum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dtrain.integrations.lightning.compat import ResultCollection, pl
from dtrain.train import collectives

Part = tuple[str, float, float]
"""A value of one process: the kind of reduction, the value (the sum for a mean) and its weight."""
_KINDS = ("mean", "sum", "max", "min")


class QuietResults(ResultCollection):
    """The logged values of a module, read from the device only when they are shown.

    Lightning reads values that are logged with `prog_bar=True` after every batch, also without a
    progress bar.
    """

    def __init__(self, training: bool, trainer: pl.Trainer) -> None:
        super().__init__(training=training)
        self._trainer = trainer

    def metrics(self, on_step: bool) -> Any:
        """Return Lightning's metrics, without those of the progress bar if there is none."""
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
    """Return how values of a Lightning result are combined; Lightning refuses other kinds."""
    return next(kind for kind in _KINDS if getattr(metric.meta, f"is_{kind}_reduction"))


def combined(everyone: Iterable[Mapping[str, Part]]) -> dict[str, tuple[float, float]]:
    """Return for each name the value over all processes (the sum for a mean) and its weight."""
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
    """Return the values that all processes have logged in a step, by Lightning's logger names.

    This reads the values from the device, so call it only when a line is written. Called by all
    ranks.

    Args:
        results: Lightning's results of the training loop.
        samples: the number of samples in this process's last batch.
        more: values of this process, in place of results of the same name.
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
        for name, (value, weight) in combined(everyone).items()
        if weight
    }


def of_epoch(results: Any) -> dict[str, float]:
    """Return the values logged for an ended epoch, over all processes. Called by all ranks."""
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
    """Return the mean; if all processes agree, it is exactly their value."""
    return values[0] if len({*values}) == 1 else math.fsum(values) / len(values)


def _shown(results: Any, *, on_step: bool) -> Iterator[tuple[str, Any]]:
    """Yield the results for a logger or a progress bar, with the name that they have there."""
    for _, metric in results.valid_items():
        meta = metric.meta
        asked = meta.on_step if on_step else meta.on_epoch
        if asked and (meta.logger or meta.prog_bar):
            yield results._forked_name(metric, on_step)[1], metric
