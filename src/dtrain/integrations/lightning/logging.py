"""The values that a LightningModule logs, exact over all ranks for any batch sizes.

Lightning's own `sync_dist` takes the mean of the ranks' means. It needs all ranks to log equally
often. Here each value is a sum and a weight until the end, and then one collective combines them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from dtrain.errors import DtrainError
from dtrain.integrations.lightning import reductions
from dtrain.integrations.lightning.compat import pl
from dtrain.task import Loss
from dtrain.train import collectives

Means = dict[str, tuple[float, float]]
"""A sum and a weight for each name."""
Sums = dict[str, tuple[float | torch.Tensor, float]]
"""A sum and a weight for each name; the sum may be on a device."""


class Logged:
    """Replaces `self.log` of a module while it trains or is evaluated."""

    def __init__(self, module: pl.LightningModule, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._original = module.log
        self._stage = ""
        self.samples = 0
        """The number of samples in the current batch."""
        self._step: Sums = {}
        """The values of all micro-batches of the last step, by the names of Lightning's loggers."""
        self._epoch: Sums = {}
        self._hidden: set[str] = set()
        """The names that are logged for epochs, with neither a logger nor a progress bar."""
        self._evaluation: Means = {}
        self._batch: dict[str, Loss | torch.Tensor] = {}
        self._metrics: dict[str, Metric] = {}
        self._loader: int | None = None
        self._loader_of: dict[str | Metric, int | None] = {}
        self._validated: Counter[int | None] = Counter()
        self.forked: dict[str, str] = {}
        """The names logged for steps and for epochs; Lightning's name for the epoch's value."""
        self.batch_index = 0
        module.log = self._log

    @contextlib.contextmanager
    def training(self, batch_index: int) -> Iterator[None]:
        self._stage, self.batch_index = "train", batch_index
        self._step = {}
        try:
            yield
        finally:
            self._stage = ""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Enter an evaluation, which may be inside a step."""
        before, self._stage = self._stage, "evaluation"
        self._validated.clear()
        self._loader_of.clear()
        try:
            yield
        finally:
            self._stage = before

    @contextlib.contextmanager
    def batch(self, loader: int | None) -> Iterator[tuple[int, dict[str, Loss | torch.Tensor]]]:
        """Enter a validation step; yield the batch's number and the dict that the step logs into.

        Args:
            loader: the number of the batch's loader; None if there is a single loader.
        """
        logged: dict[str, Loss | torch.Tensor] = {}
        self._batch, self._loader = logged, loader
        self._stage = "batch"
        try:
            yield self._validated[loader], logged
            self._validated[loader] += 1
        finally:
            self._stage = "evaluation"

    def of_step(self) -> dict[str, float]:
        """Return the means over the last step's samples of all ranks; this waits for the device.

        Called by all ranks.
        """
        own: dict[str, reductions.Part] = {
            name: ("mean", total, weight) for name, (total, weight) in _read(self._step).items()
        }
        results = self._trainer.fit_loop.epoch_loop._results
        return reductions.of_step(results, float(self.samples), own)

    def shown(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of an epoch that are for a logger or a progress bar."""
        return {name: value for name, value in metrics.items() if name not in self._hidden}

    def of_epoch(self) -> dict[str, float]:
        """Return the means of the values logged with `on_epoch` in training steps, and reset them.

        Called by all ranks.
        """
        found, self._epoch = _read(self._epoch), {}
        return self._agreed(found)

    def epoch_so_far(self) -> Means:
        """Return the sums of the epoch until now, over all ranks. Called by all ranks."""
        return _sums(collectives.gather_to_all(_read(self._epoch)))

    def continue_from(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Start with earlier sums of the same epoch; only one rank may get them."""
        self._epoch = {name: (total, weight) for name, (total, weight) in sums.items()}

    def counted(self) -> dict[str, float]:
        """Compute the objects of torchmetrics that were logged. Called by all ranks."""
        names = {name for each in collectives.gather_to_all(list(self._metrics)) for name in each}
        return {name: float(self._of_name(name).compute()) for name in sorted(names)}

    def of_evaluation(self) -> dict[str, float]:
        """Return the metrics of an evaluation that its batches do not give. Called by all ranks."""
        found, self._evaluation = self._evaluation, {}
        metrics = self._agreed(found) | self.counted()
        for each in self._metrics.values():  # one may have several names
            each.reset()
        self._metrics = {}
        return metrics

    def _agreed(self, mine: Means) -> dict[str, float]:
        """Return the means over all ranks; a rank without samples learns the names here."""
        everyone = collectives.gather_to_all((mine, self.forked))
        for _, forked in everyone:
            self.forked |= forked
        return _means([means for means, _ in everyone])

    def _of_name(self, name: str) -> Metric:
        if name not in self._metrics:
            raise DtrainError(
                f"the metric {name} was logged on some ranks only; for an object of torchmetrics "
                "every rank needs a sample to evaluate",
                code="lightning.metric-on-some-ranks",
            )
        return self._metrics[name]

    def _log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        **options: Any,
    ) -> None:
        options |= {"prog_bar": prog_bar, "logger": logger}
        options |= {"on_step": on_step, "on_epoch": on_epoch}
        if not self._stage:
            self._original(name, value, **options)
        elif self._stage == "train":
            self._log_step(name, value, options)
        elif self._stage == "batch":
            self._log_batch(name, value, options)
        elif isinstance(value, Metric):
            self._metrics[name] = value
        else:
            self._evaluation[name] = _number(value), 1.0

    def _log_batch(self, name: str, value: Any, options: Mapping[str, Any]) -> None:
        """Log under Lightning's name, which is different for each of several loaders."""
        suffix = ""
        if self._loader is not None and options.get("add_dataloader_idx", True):
            suffix = f"/dataloader_idx_{self._loader}"
        if options.get("on_step") and options.get("on_epoch"):
            self.forked[name + suffix] = f"{name}_epoch{suffix}"
        name += suffix
        self._require_one_loader(name, f"self.log({name!r}) has one name")
        if isinstance(value, Metric):
            self._require_one_loader(value, f"self.log({name!r}) has one object of torchmetrics")
            self._metrics[name] = value
        else:
            self._batch[name] = _weighted(name, value, options)

    def _require_one_loader(self, what: str | Metric, sentence: str) -> None:
        """Refuse a name or an object that another loader's batches were logged with."""
        if self._loader_of.setdefault(what, self._loader) != self._loader:
            raise DtrainError(
                f"{sentence} for two validation loaders, which would mix them; each needs its own",
                code="lightning.log-of-two-loaders",
            )

    def _log_step(self, name: str, value: Any, options: dict[str, Any]) -> None:
        """Log a step's value now and from this rank, like Lightning; an epoch's at its end."""
        if isinstance(value, Metric):
            self._original(name, value, **options)
            return
        size, of_epoch = options.pop("batch_size", None) or self.samples, options["on_epoch"]
        is_shown = options["logger"] in (True, None) or options["prog_bar"]
        if of_epoch:
            _require_mean(name, options)
            _add(self._epoch, name, value, float(size))
            if not is_shown:
                self._hidden |= {name, f"{name}_epoch"}
        options |= {"on_epoch": False, "sync_dist": False, "batch_size": size}
        if options["on_step"] is False:
            return
        options["on_step"] = True
        if is_shown and _is_mean(options):
            _add(self._step, f"{name}_step" if of_epoch else name, value, float(size))
        if of_epoch:  # Lightning has three names for it
            self.forked[name] = f"{name}_epoch"
            self._original(f"{name}_step", value, **options)
            options |= {"logger": False, "prog_bar": False}
        self._original(name, value, **options)


def _is_mean(options: Mapping[str, Any]) -> bool:
    return options.get("reduce_fx", "mean") in ("mean", torch.mean)


def _require_mean(name: str, options: Mapping[str, Any]) -> None:
    if not _is_mean(options):
        raise DtrainError(
            f"self.log({name!r}, reduce_fx={options['reduce_fx']}): only means are supported for "
            "epochs and evaluations; log the mean over the batch, or an object of torchmetrics",
            code="lightning.log-not-a-mean",
        )


def _weighted(name: str, value: Any, options: Mapping[str, Any]) -> Loss | torch.Tensor:
    _require_mean(name, options)
    tensor = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    size = options.get("batch_size")
    return tensor if size is None else Loss(tensor * size, float(size))


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _add(sums: Sums, name: str, value: Any, weight: float) -> None:
    """Add a value to the sums, without waiting for the device that a tensor is on."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double()
    total, before = sums.get(name, (0.0, 0.0))
    sums[name] = total + value * weight, before + weight


def _read(sums: Sums) -> Means:
    return {name: (float(total), weight) for name, (total, weight) in sums.items()}


def _means(everyone: list[Means]) -> dict[str, float]:
    return {name: total / weight for name, (total, weight) in _sums(everyone).items() if weight}


def _sums(everyone: list[Means]) -> Means:
    sums: Means = {}
    for means in everyone:
        for name, (total, weight) in means.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + weight
    return sums
