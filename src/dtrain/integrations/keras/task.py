"""A compiled Keras 3 model, on the torch backend, as a task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.integrations.keras.data import as_dataset
from dtrain.integrations.keras.metrics import EpochMetrics, MetricStates
from dtrain.integrations.keras.optimizer import KerasOptimizer
from dtrain.integrations.keras.train_step import OwnTrainStep, is_own
from dtrain.integrations.keras.variables import (
    SeedGenerators,
    as_buffers,
    replicated,
    with_plain_replicas,
)
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
    _own_step: OwnTrainStep | None = None

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
        self._own_step = OwnTrainStep(model) if is_own(model, "train_step") else None
        _check_compiled(model)
        if not _is_complete(model):
            self._complete(model)
        as_buffers(model)
        with_plain_replicas(model)
        self._generators = SeedGenerators(model)
        self._states = MetricStates(model)
        self.epoch_metrics = EpochMetrics(self._states)
        return model

    def _complete(self, model: Any) -> None:
        """Call the model with a sample, so that it, its losses and metrics have all variables."""
        import keras

        batch = self.collate([_first(self.train_dataset())])
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        options = {"training": False} if model._call_has_training_arg else {}
        with torch.no_grad():
            predicted = model(x, **options)
            if self._own_step is None:  # else only that knows what is computed of the data
                model._compute_loss(x, y, predicted, weight, training=False)
                model.compute_metrics(x, y, predicted, sample_weight=weight)
        model.reset_metrics()

    def train_dataset(self) -> Any:
        return as_dataset(self.train_data(), self.steps_per_epoch)

    def eval_dataset(self) -> Any:
        return as_dataset(self.eval_data())

    def loss(self, model: Any, batch: Any) -> Loss | torch.Tensor:
        """Compute the loss of the model, a mean over the batch, and update its metrics.

        It is that of `compute_loss`, or of the model's own `train_step`. With a mask, the mean is
        over the elements that are not masked.
        """
        value: Loss | torch.Tensor
        with self._measured(model, batch) as data:
            if self._own_step is None:
                value, names = _default_step(model, *data)
            else:
                value, names = self._own_step(model, _packed(*data))
            self.epoch_metrics.add(self._states.take(names))
        return value

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Return the compiled optimizer as a torch optimizer."""
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise DtrainError(
                "strategy 'fsdp' cannot shard the variables of Keras; use 'ddp'",
                code="plan.unsupported-combination",
            )
        return KerasOptimizer(model)

    def evaluate(self, model: Any, batch: Any) -> Mapping[str, Any]:
        """Call the model's `test_step`. Its metrics are exact over all ranks."""
        with self._measured(model, batch) as data:
            returned = model.test_step(_packed(*data))
            own = is_own(model, "test_step") or is_own(model, "compute_metrics")
            return {"metrics": self._states.take(set(returned) if own else None)}

    def training_metrics(self) -> dict[str, float]:
        """Return the metrics of the training, over the epoch so far. All ranks call it."""
        return self.epoch_metrics.results()

    def as_callbacks(self, given: list[Any]) -> list[Any]:
        """Convert the callbacks of Keras among those that `callbacks()` returned."""
        from dtrain.integrations.keras.callbacks import adapted

        return adapted(given, self.epoch_metrics)

    @contextlib.contextmanager
    def _measured(self, model: Any, batch: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Yield (x, y, sample_weight) of a batch, with all metrics at zero."""
        import keras

        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        num_samples = int(keras.tree.flatten(x)[0].shape[0])
        draws = self._generators.keyed() if self._generators else contextlib.nullcontext()
        with draws, replicated(model):
            self._states.begin(num_samples)
            yield x, y, weight


def _default_step(
    model: Any, x: Any, y: Any, weight: Any
) -> tuple[Loss | torch.Tensor, set[str] | None]:
    """Return the loss, and the names of the metrics if the model computes them itself."""
    options = {"training": True} if model._call_has_training_arg else {}
    predicted = model(x, **options)
    loss = model._compute_loss(x, y, predicted, weight, training=True)
    if not is_own(model, "compute_loss"):
        loss = _over_unmasked(loss, predicted)
    with torch.no_grad():
        if is_own(model, "compute_metrics"):
            return loss, set(model.compute_metrics(x, y, predicted, sample_weight=weight))
        if model._compile_metrics is not None:
            model._compile_metrics.update_state(y, predicted, weight)
    return loss, None


def _over_unmasked(loss: torch.Tensor, predicted: Any) -> Loss | torch.Tensor:
    """Return a loss with its weight, if masks decide how many elements it is a mean of.

    Raises:
        DtrainError: several outputs have different masks, so that there is no one weight.
    """
    import keras
    from keras.src.backend import get_keras_mask

    masks = [get_keras_mask(each) for each in keras.tree.flatten(predicted)]
    if all(mask is None for mask in masks):
        return loss
    if any(mask is not masks[0] for mask in masks):
        raise DtrainError(
            "the outputs have different masks, so the loss of a batch is no mean over samples, and "
            "would depend on how it is split; write compute_loss()",
            code="keras.loss-reduction",
        )
    weight = masks[0].sum().detach()
    return Loss(loss * weight, weight)


def _packed(x: Any, y: Any, weight: Any) -> Any:
    """Return the data of a step in the form that `fit` gives it."""
    import keras

    return keras.utils.pack_x_y_sample_weight(x, y, weight)


def _is_complete(model: Any) -> bool:
    """Return whether the model, its losses and its metrics have all their variables."""
    own_step = is_own(model, "train_step")
    layers = model._flatten_layers(include_self=not own_step)
    parts = [] if own_step else [model._compile_loss, model._compile_metrics]
    return all(each.built for each in (*layers, *parts) if each is not None)


def _check_compiled(model: Any) -> None:
    """Check that the arguments of `compile` mean the same here as in `fit`.

    Raises:
        DtrainError: an argument does not; the message names a replacement.
    """
    _refuse_loops(model)
    _refuse_losses(model)
    _refuse_optimizer(model.optimizer)
    if model.jit_compile is True:
        raise DtrainError(
            "compile(jit_compile=True) is for fit, and dtrain does not compile models; leave it "
            "out",
            code="keras.compile-argument",
        )


def _refuse_loops(model: Any) -> None:
    for method in ("fit", "evaluate", "make_train_function", "make_test_function"):
        if is_own(model, method):
            raise DtrainError(
                f"{type(model).__name__} has its own {method}(), which dtrain never calls: it "
                "runs the loop. Write train_step(), test_step(), compute_loss() or "
                "compute_metrics()",
                code="keras.train-step",
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
    if optimizer.loss_scale_factor is not None:
        raise DtrainError(
            "the optimizer has loss_scale_factor; leave it out: with train.precision: fp16, dtrain "
            "scales the loss itself",
            code="keras.optimizer-option",
        )


def _first(dataset: Any) -> Any:
    return next(iter(dataset)) if is_stream(dataset) else dataset[0]
