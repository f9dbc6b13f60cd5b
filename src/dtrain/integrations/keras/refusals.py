"""What of a compiled model cannot be trained here, told before the first step."""

from __future__ import annotations

from typing import Any

from dtrain.errors import DtrainError

_MEANS = ("sum_over_batch_size", "mean")
"""Reductions of losses that are means over the samples of a batch."""


def refuse_what_differs(model: Any) -> None:
    """Make sure that what `compile` was given means the same here as in `fit`.

    Raises:
        DtrainError: something does not; says what to use.
    """
    _refuse_losses(model)
    _refuse_optimizer(model.optimizer)
    if model.jit_compile is True:
        raise DtrainError(
            "compile(jit_compile=True) is for fit, and dtrain does not compile models; leave it out"
        )


def _refuse_losses(model: Any) -> None:
    import keras

    losses = [each for each in keras.tree.flatten(model.loss) if hasattr(each, "reduction")]
    for loss in losses:
        if loss.reduction not in _MEANS:
            raise DtrainError(
                f"loss {loss.name!r} has reduction={loss.reduction!r}, whose size depends on how "
                "a batch is cut; use reduction='sum_over_batch_size', the default"
            )


def _refuse_optimizer(optimizer: Any) -> None:
    import keras

    if optimizer is None:
        raise DtrainError("the model is compiled without an optimizer: compile(optimizer=…)")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise DtrainError(
            "the optimizer scales the loss for float16, which dtrain does itself: leave Keras's "
            "dtype policy at float32, and give train.precision: fp16"
        )
    if optimizer.gradient_accumulation_steps is not None:
        raise DtrainError(
            "the optimizer has gradient_accumulation_steps; leave them out, and give "
            "train.micro_batch_size: a step is a whole global batch, in parts of that size"
        )
    if optimizer.use_ema:
        raise DtrainError(
            "the optimizer has use_ema, whose averages fit puts into the model at its end; there "
            "is nothing like it here yet: leave it out"
        )
