"""A compiled Keras 3 model, on the torch backend, as a task."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.integrations.keras.data import as_dataset
from dtrain.integrations.keras.optimizer import KerasOptimizer
from dtrain.integrations.keras.variables import SeedGenerators, as_buffers, replicated
from dtrain.task import Loss, Task
from dtrain.train.data.stream import is_stream

_MEANS = ("sum_over_batch_size", "mean")
"""Reductions of losses that are means over the samples of a batch."""


class KerasTask(Task):
    """A task of `compiled()` and `train_data()`; loss, optimizer and metrics are the model's own.

    Data are arrays or tensors as a tuple `(x, y)` or `(x, y, sample_weight)`, or a data set of
    such samples. `dtrain.integrations.keras.data.as_dataset` lists all kinds.
    """

    steps_per_epoch: int | None = None
    """The number of batches in an epoch, if `train_data()` is a generator without an end."""
    _generators: SeedGenerators | None = None

    def compiled(self) -> Any:
        """Return the model, after `model.compile(optimizer, loss, metrics)`."""
        raise NotImplementedError

    def train_data(self) -> Any:
        """Return the training data: arrays or a data set."""
        raise NotImplementedError

    def eval_data(self) -> Any:
        """Return arrays or a data set for evaluation; None means that there is no evaluation."""
        return None

    def model(self) -> Any:
        """See `Task`.

        Raises:
            DtrainError: the model, or an argument of its `compile`, is not supported.
        """
        import keras

        if keras.config.backend() != "torch":
            raise DtrainError(
                f"Keras runs on backend {keras.config.backend()!r}, and dtrain trains with "
                "'torch': leave KERAS_BACKEND unset, or give --env KERAS_BACKEND=torch",
                code="keras.other-backend",
            )
        keras.utils.clear_session()  # names count up otherwise, and checkpoints use the names
        model = self.compiled()
        if not isinstance(model, keras.Model) or not getattr(model, "compiled", False):
            raise DtrainError(
                f"compiled() returned {type(model).__name__}; it must return a keras.Model after "
                "model.compile(optimizer=…, loss=…)",
                code="keras.not-compiled",
            )
        if not model.built:
            batch = self.collate([_first(self.train_dataset())])
            model(keras.utils.unpack_x_y_sample_weight(batch)[0])
        _check_compiled(model)
        as_buffers(model)
        self._generators = SeedGenerators(model)
        return model

    def train_dataset(self) -> Any:
        return as_dataset(self.train_data(), self.steps_per_epoch)

    def eval_dataset(self) -> Any:
        return as_dataset(self.eval_data())

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Compute the compiled loss and the model's additional losses, as a mean over the batch."""
        value: torch.Tensor = self._called(model, batch, training=True)[1]
        return value

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Return the compiled optimizer as a torch optimizer."""
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise DtrainError(
                "strategy 'fsdp' cannot shard the variables of Keras; use 'ddp'",
                code="plan.unsupported-combination",
            )
        return KerasOptimizer(model)

    def evaluate(self, model: Any, batch: Any) -> Mapping[str, Loss | torch.Tensor | float]:
        """Compute the loss and the compiled metrics, as sums and weights: exact over all ranks."""
        (x, y, weight), loss, predicted = self._called(model, batch, training=False)
        model.reset_metrics()
        model.compute_metrics(x, y, predicted, sample_weight=weight)
        found: dict[str, Loss | torch.Tensor | float] = {"loss": loss}
        for metric in _compiled_metrics(model):
            found[metric.name] = Loss(metric.total.value.clone(), metric.count.value.clone())
        model.reset_metrics()
        return found

    def as_callbacks(self, given: list[Any]) -> list[Any]:
        """Convert the callbacks of Keras among those that `callbacks()` returned."""
        from dtrain.integrations.keras.callbacks import adapted

        return adapted(given)

    def _called(self, model: Any, batch: Any, *, training: bool) -> tuple[Any, Any, Any]:
        """Call the model; return ((x, y, sample_weight), loss, predictions) of a batch."""
        import keras

        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        options = {"training": training} if model._call_has_training_arg else {}
        draws = self._generators.keyed() if self._generators else contextlib.nullcontext()
        with draws, replicated(model):
            predicted = model(x, **options)
            loss = model._compute_loss(x, y, predicted, weight, training=training)
        return (x, y, weight), loss, predicted


def _check_compiled(model: Any) -> None:
    """Check that the arguments of `compile` mean the same here as in `fit`.

    Raises:
        DtrainError: an argument does not; the message names a replacement.
    """
    _refuse_losses(model)
    _refuse_optimizer(model.optimizer)
    if model.jit_compile is True:
        raise DtrainError(
            "compile(jit_compile=True) is for fit, and dtrain does not compile models; leave it "
            "out",
            code="keras.compile-argument",
        )


def _refuse_losses(model: Any) -> None:
    import keras

    losses = [each for each in keras.tree.flatten(model.loss) if hasattr(each, "reduction")]
    for loss in losses:
        if loss.reduction not in _MEANS:
            raise DtrainError(
                f"loss {loss.name!r} has reduction={loss.reduction!r}, whose value depends on how "
                "a batch is split; use reduction='sum_over_batch_size', the default",
                code="keras.loss-reduction",
            )


def _refuse_optimizer(optimizer: Any) -> None:
    import keras

    if optimizer is None:
        raise DtrainError(
            "the model is compiled without an optimizer; write compile(optimizer=…)",
            code="keras.not-compiled",
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise DtrainError(
            "the optimizer scales the loss for float16, which dtrain does itself: leave Keras's "
            "dtype policy at float32, and set train.precision: fp16",
            code="keras.optimizer-option",
        )
    if optimizer.gradient_accumulation_steps is not None:
        raise DtrainError(
            "the optimizer has gradient_accumulation_steps; leave them out, and set "
            "train.micro_batch_size: a step is a whole global batch, in parts of that size",
            code="keras.optimizer-option",
        )
    if optimizer.use_ema:
        raise DtrainError(
            "the optimizer has use_ema: at its end, fit copies the averages into the model. dtrain "
            "does not do that yet: leave it out",
            code="keras.optimizer-option",
        )


def _first(dataset: Any) -> Any:
    return next(iter(dataset)) if is_stream(dataset) else dataset[0]


def _compiled_metrics(model: Any) -> list[Any]:
    """Return the metrics other than the loss.

    Raises:
        DtrainError: a metric is not a mean, so it cannot be combined from parts.
    """
    import keras

    found = [metric for metric in model.metrics if metric.name != "loss"]
    flat = [m for metric in found for m in getattr(metric, "metrics", [metric])]
    for metric in flat:
        if not isinstance(metric, keras.metrics.Mean):
            raise DtrainError(
                f"metric {metric.name!r} ({type(metric).__name__}) is not a mean over samples, so "
                "it cannot be combined from the parts of several processes; write predict(), and "
                "compute it from predictions.npz",
                code="keras.metric-not-a-mean",
            )
    return flat
