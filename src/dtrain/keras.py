"""A compiled Keras 3 model, on the torch backend, as a task.

Keras wraps DistributedDataParallel around a model in its own `fit` (from 3.15 on); here its
`fit` never runs, so that dtrain's strategy is the only one that wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from dtrain.errors import DtrainError
from dtrain.task import Loss, Task

_MEANS = ("sum_over_batch_size", "mean")
"""Reductions of losses that are means over the samples of a batch."""


class KerasTask(Task):
    """A task of `compiled()` and `train_data()`; loss, optimizer and metrics are the model's own.

    Data are arrays or tensors as a tuple `(x, y)` or `(x, y, sample_weight)`, or a data set of
    such samples.
    """

    def compiled(self) -> Any:
        """The model, after `model.compile(optimizer, loss, metrics)`."""
        raise NotImplementedError

    def train_data(self) -> Any:
        """Arrays, or a data set."""
        raise NotImplementedError

    def eval_data(self) -> Any:
        """Arrays, or a data set, for evaluation; None when there is nothing to evaluate."""
        return None

    def model(self) -> Any:
        """See `Task`.

        Raises:
            DtrainError: the model, or what it is compiled with, cannot be trained here.
        """
        import keras

        if keras.config.backend() != "torch":
            raise DtrainError(
                f"Keras runs on backend {keras.config.backend()!r}, and dtrain trains with "
                "'torch': leave KERAS_BACKEND unset, or give --env KERAS_BACKEND=torch"
            )
        keras.utils.clear_session()  # names count up otherwise, and checkpoints go by name
        model = self.compiled()
        if not isinstance(model, keras.Model) or not getattr(model, "compiled", False):
            raise DtrainError(
                f"compiled() returned {type(model).__name__}; it must return a keras.Model after "
                "model.compile(optimizer=…, loss=…)"
            )
        if not model.built:
            first = self.collate([self.train_dataset()[0]])
            model(keras.utils.unpack_x_y_sample_weight(first)[0])
        _refuse_what_ranks_cannot_share(model)
        return model

    def train_dataset(self) -> Any:
        """See `Task`."""
        return _as_dataset(self.train_data())

    def eval_dataset(self) -> Any:
        """See `Task`."""
        return _as_dataset(self.eval_data())

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The compiled loss, with the model's own additional losses: a mean over the batch."""
        if getattr(model, "_is_replica", False):
            raise DtrainError(
                "strategy 'dp' copies the model to every device, which the variables of Keras do "
                "not follow; use 'ddp'"
            )
        value: torch.Tensor = _called(model, batch, training=True)[1]
        return value

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """The compiled optimizer, as torch's."""
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise DtrainError("strategy 'fsdp' cannot cut the variables of Keras; use 'ddp'")
        return KerasOptimizer(model)

    def evaluate(self, model: Any, batch: Any) -> Mapping[str, Loss | torch.Tensor | float]:
        """The loss and the compiled metrics, as sums and weights, so exact over all ranks."""
        (x, y, weight), loss, predicted = _called(model, batch, training=False)
        model.reset_metrics()
        model.compute_metrics(x, y, predicted, sample_weight=weight)
        found: dict[str, Loss | torch.Tensor | float] = {"loss": loss}
        for metric in _compiled_metrics(model):
            found[metric.name] = Loss(metric.total.value.clone(), metric.count.value.clone())
        model.reset_metrics()
        return found


class KerasOptimizer(torch.optim.Optimizer):
    """A Keras optimizer that steps as torch's do; its slots are the state of each parameter."""

    def __init__(self, model: Any) -> None:
        self._keras = model.optimizer
        self._variables = list(model.trainable_variables)
        self._keras.build(self._variables)
        super().__init__([variable.value for variable in self._variables], {"lr": self._rate()})
        for name, slots in self._slots().items():
            for variable, slot in zip(self._variables, slots, strict=True):
                if slot is not None:
                    self.state[variable.value][name] = slot.value
        self._note()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply the gradients; the learning rate follows its schedule."""
        with torch.no_grad():
            gradients = [variable.value.grad for variable in self._variables]
            self._keras.apply(gradients, self._variables)
            self._note()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the variables of Keras, where it lives."""
        for index, values in state_dict["state"].items():
            for name, value in values.items():
                self.state[self._variables[index].value][name].copy_(value)
        shared = state_dict["param_groups"][0]["shared"]
        for variable, value in zip(self._shared(), shared, strict=True):
            variable.assign(value)
        self._note()

    def _slots(self) -> dict[str, list[Any]]:
        """Attribute → one variable for each trainable one; Keras keeps slots in such lists."""
        return {
            name.lstrip("_"): list(value)
            for name, value in vars(self._keras).items()
            if isinstance(value, list)
            and name not in ("_trainable_variables", "_variables")
            and len(value) == len(self._variables)
            and any(hasattr(each, "assign") for each in value)
        }

    def _shared(self) -> list[Any]:
        """The optimizer's other variables: how often it stepped, its learning rate."""
        slots = {id(each) for slots in self._slots().values() for each in slots}
        return [each for each in self._keras.variables if id(each) not in slots]

    def _note(self) -> None:
        group = self.param_groups[0]
        group["lr"] = self._rate()
        group["shared"] = [variable.value.tolist() for variable in self._shared()]

    def _rate(self) -> float:
        return float(self._keras.learning_rate)


def _called(model: Any, batch: Any, *, training: bool) -> tuple[tuple[Any, ...], Any, Any]:
    """((x, y, sample_weight), loss, predictions) of a batch."""
    import keras

    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    how = {"training": training} if model._call_has_training_arg else {}
    predicted = model(x, **how)
    loss = model._compute_loss(x, y, predicted, weight, training=training)
    return (x, y, weight), loss, predicted


def _compiled_metrics(model: Any) -> list[Any]:
    """The metrics besides the loss.

    Raises:
        DtrainError: one is not a mean, so that it cannot be put together from parts.
    """
    import keras

    found = [metric for metric in model.metrics if metric.name != "loss"]
    flat = [m for metric in found for m in getattr(metric, "metrics", [metric])]
    for metric in flat:
        if not isinstance(metric, keras.metrics.Mean):
            raise DtrainError(
                f"metric {metric.name!r} ({type(metric).__name__}) is not a mean over samples, so "
                "parts of it from several processes do not make a whole; write predict(), and "
                "compute it from predictions.npz"
            )
    return flat


def _as_dataset(data: Any) -> Any:
    if not isinstance(data, tuple | list):
        return data
    return TensorDataset(*(torch.as_tensor(part) for part in data))


def _refuse_what_ranks_cannot_share(model: Any) -> None:
    import keras

    losses = [each for each in keras.tree.flatten(model.loss) if hasattr(each, "reduction")]
    for loss in losses:
        if loss.reduction not in _MEANS:
            raise DtrainError(
                f"loss {loss.name!r} has reduction={loss.reduction!r}, whose size depends on how "
                "a batch is cut; use reduction='sum_over_batch_size', the default"
            )
    several = dist.is_initialized() and dist.get_world_size() > 1
    for layer in model._flatten_layers() if several else ():
        if isinstance(layer, keras.layers.BatchNormalization):
            raise DtrainError(
                f"layer {layer.name!r} keeps statistics of its own process's samples, which "
                "differ between processes; use GroupNormalization or LayerNormalization, or one "
                "process (--strategy single)"
            )
