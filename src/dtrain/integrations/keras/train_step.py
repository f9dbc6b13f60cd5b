"""A model's own `train_step`, of which dtrain does the backward and the update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from dtrain.errors import DtrainError


def is_own(model: Any, method: str) -> bool:
    """Return whether a model has its own method instead of that of `keras.Model`."""
    import keras

    return getattr(getattr(model, method), "__func__", None) is not getattr(keras.Model, method)


class OwnTrainStep:
    """Calls a model's own `train_step`, without its backward and without its update.

    `loss.backward()` only notes the loss, which dtrain then differentiates: with the weights of
    all processes, and over several micro-batches if there are any. The gradients that the step
    reads may only be passed on to `optimizer.apply`; any other use of them is an error, because
    their values are not known yet.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._name = f"train_step() of {type(model).__name__}"
        self._unknown: dict[int, torch.Tensor] = {}
        others = [
            name
            for name, value in vars(model).items()
            if _is_optimizer(value) and value is not model.optimizer
        ]
        if others:
            self._refuse(f"has another optimizer, {others[0]!r}")

    def __call__(self, model: Any, data: Any) -> tuple[torch.Tensor, set[str] | None]:
        """Return the loss with its graph, and the names of the values that the step returned.

        Raises:
            DtrainError: the step does more than one backward and one update of all weights.
        """
        if model is not self._model:
            raise DtrainError(
                f"strategy 'dp' copies the model, but {self._name} reads gradients of the "
                "original; use 'ddp'",
                code="plan.unsupported-combination",
            )
        # those of other types are the seeds of layers, which a forward changes
        parameters = [each for each in self._model.parameters() if each.is_floating_point()]
        before = [(each, each.grad, each._version) for each in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._losses: list[torch.Tensor] = []
        self._applied = 0
        try:
            with self._intercepted():
                returned = self._model.train_step(data)
        finally:
            for parameter, gradient, _ in before:
                parameter.grad = gradient
        if not self._losses or not self._applied:
            self._refuse("does no backward() and no optimizer.apply() in a call")
        if any(parameter._version != version for parameter, _, version in before):
            self._refuse("changes weights itself, before the gradients are applied")
        names = set(returned) if isinstance(returned, Mapping) else None
        return self._losses[0], names

    @contextlib.contextmanager
    def _intercepted(self) -> Iterator[None]:
        from keras.src.optimizers.base_optimizer import BaseOptimizer

        backward, apply = torch.autograd.backward, BaseOptimizer.apply
        torch.autograd.backward = self._backward
        BaseOptimizer.apply = lambda *args, **kwargs: self._apply(*args, **kwargs)
        try:
            yield
        finally:
            torch.autograd.backward, BaseOptimizer.apply = backward, apply

    def _backward(self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        """Note the loss; the gradients become placeholders."""
        losses = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, torch.Tensor) else grad_tensors
        if self._losses or len(losses) != 1 or any(each is not None for each in given or ()):
            self._refuse("does more than one backward(), or gives it a gradient")
        self._losses = losses
        for variable in self._model.trainable_variables:
            parameter = variable.value
            if id(parameter) not in self._unknown:
                gradient = torch.empty(1, dtype=parameter.dtype, device=parameter.device)
                self._unknown[id(parameter)] = gradient.expand(parameter.shape).as_subclass(
                    _Unknown
                )
            parameter.grad = self._unknown[id(parameter)]

    def _apply(self, optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
        everything = list(self._model.trainable_variables)
        given = everything if trainable_variables is None else list(trainable_variables)
        self._applied += 1
        if optimizer is not self._model.optimizer or self._applied > 1:
            self._refuse("calls apply() more than once, or of another optimizer")
        if {id(each) for each in given} != {id(each) for each in everything}:
            self._refuse(f"updates {len(given)} of {len(everything)} trainable variables")
        for variable, gradient in zip(given, grads, strict=True):
            if gradient is not self._unknown.get(id(variable.value)):
                self._refuse("gives apply() other gradients than those of its backward()")

    def _refuse(self, what: str) -> NoReturn:
        raise DtrainError(
            f"{self._name} {what}. dtrain does the backward and the update, once a step for all "
            "processes, so a step must compute one loss, call its backward(), and apply the "
            "gradients of all trainable variables unchanged. Write anything else as a "
            "LightningModule with manual optimization, or as a script",
            code="keras.train-step",
        )


class _Unknown(torch.Tensor):
    """A gradient that will be known after the backward over all processes."""

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> Any:
        name = getattr(function, "__name__", str(function))
        raise DtrainError(
            f"train_step() uses the gradients ({name}) before dtrain has computed them over all "
            "processes. To clip them, use train.clip_grad_norm of the job, or clipnorm, clipvalue "
            "or global_clipnorm of the optimizer",
            code="keras.train-step",
        )


def _is_optimizer(value: Any) -> bool:
    import keras

    return isinstance(value, keras.optimizers.Optimizer | torch.optim.Optimizer)
