"""The arguments of Lightning's Trainer for its own loops: the job's fields, and the user's own."""

from __future__ import annotations

from typing import Any

from dtrain.errors import UsageError
from dtrain.train.context import TrainContext

_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

_EQUIVALENT_FIELDS = {
    "gradient_clip_val": "train.clip_grad_norm",
    "accumulate_grad_batches": "train.micro_batch_size",
    "val_check_interval": "eval.every_steps",
    "check_val_every_n_epoch": "eval.every_epochs",
}
"""Arguments for which the job has its own field; a job may set only one of the two."""


def trainer_arguments(context: TrainContext, automatic: bool) -> dict[str, Any]:
    """Return all arguments except the strategy and the callbacks.

    Args:
        context: the context of the training.
        automatic: whether Lightning makes the steps, and not the module.

    Raises:
        UsageError: two settings of the job exclude each other; the message names them.
    """
    spec, ranks = context.spec, context.ranks
    own = spec.lightning.trainer
    fields: dict[str, Any] = {
        "train.clip_grad_norm": spec.train.clip_grad_norm,
        "train.micro_batch_size": spec.train.micro_batch_size,
        "eval.every_steps": spec.eval.every_steps,
        "eval.every_epochs": spec.eval.every_epochs,
    }
    for name, field in _EQUIVALENT_FIELDS.items():
        if name in own and fields[field] is not None:
            raise UsageError(
                f"lightning.trainer.{name} and {field} mean the same; leave one of them out",
                code="lightning.given-twice",
            )
    if spec.eval.every_steps is not None and spec.eval.every_epochs is not None:
        raise UsageError(
            "Lightning's loops validate by steps or by epochs; leave out eval.every_steps or "
            "eval.every_epochs",
            code="lightning.two-intervals",
        )
    if spec.train.clip_grad_norm is not None and not automatic:
        raise UsageError(
            "train.clip_grad_norm: with automatic_optimization = False the module makes its own "
            "steps; leave it out, and call self.clip_gradients() in training_step()",
            code="lightning.manual-optimization",
        )
    decided: dict[str, Any] = {
        "accelerator": "cuda" if context.device.type == "cuda" else "cpu",
        "devices": ranks.local_world_size,
        "num_nodes": max(1, ranks.world_size // ranks.local_world_size),
        "precision": _PRECISION[spec.train.precision],
        "max_epochs": -1 if spec.train.epochs is None else spec.train.epochs,
        "max_steps": -1 if spec.train.steps is None else spec.train.steps,
    }
    if context.recorder is not None and context.recorder.in_fp64:
        decided["precision"] = "64-true"
    if spec.train.clip_grad_norm is not None:
        decided["gradient_clip_val"] = spec.train.clip_grad_norm
    if spec.eval.every_steps is not None:
        decided |= {"val_check_interval": spec.eval.every_steps, "check_val_every_n_epoch": None}
    elif spec.eval.every_epochs is not None:
        decided["check_val_every_n_epoch"] = spec.eval.every_epochs
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(context.run.path / "lightning"),
        "log_every_n_steps": spec.log.every_steps,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": ranks.world_size > 1,
    }
    return {**defaults, **own, **decided}
