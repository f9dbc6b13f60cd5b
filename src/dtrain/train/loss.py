"""The loss contract: a sum and the weight it is the sum of, whatever the task returned."""

from __future__ import annotations

from numbers import Real
from typing import Any, Final

import torch

from dtrain.errors import DtrainError
from dtrain.task import Loss, Task
from dtrain.train.contract import described, named

NO_SAMPLES: Final = object()
"""Instead of a batch: a loss of zero that depends on every parameter. A rank without samples
joins DDP's reduction with it; no sample is made up and none of the task's code runs."""

LossParts = tuple[torch.Tensor, float | torch.Tensor]
"""(sum with its graph, weight), both scalars."""


def read_loss(value: Any, num_samples: int, told: str = "loss()") -> LossParts:
    """What a task returned, as (sum, weight).

    Args:
        value: `Loss`, or a scalar that means "mean over this batch's samples".
        num_samples: samples in the batch.
        told: who returned it, for the message.

    Raises:
        DtrainError: it is neither.
    """
    if isinstance(value, Loss):
        weight = value.weight
        if not isinstance(weight, int | float):
            weight = _scalar(weight, f"{told} returned a Loss whose weight is").detach()
        return _scalar(value.sum, f"{told} returned a Loss whose sum is"), weight
    return _scalar(value, f"{told} returned") * num_samples, float(num_samples)


def _scalar(value: Any, what: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        tensor = value
    elif isinstance(value, Real):
        tensor = torch.tensor(float(value))
    else:
        raise DtrainError(
            f"{what} {described(value)}; return a scalar tensor (the mean over the batch) or "
            "dtrain.task.Loss(sum, weight)",
            code="task.loss-not-scalar",
        )
    if tensor.numel() != 1:
        raise DtrainError(
            f"{what} a tensor of shape {tuple(tensor.shape)}, not of one element; reduce it first "
            "(mean for a scalar loss, sum for Loss)",
            code="task.loss-not-scalar",
        )
    if tensor.dtype in (torch.float16, torch.bfloat16):  # a sum of 100 losses has 8 bits there
        tensor = tensor.float()
    return tensor if tensor.dim() == 0 else tensor.reshape(())


def in_fp64(value: float | torch.Tensor) -> float | torch.Tensor:
    """A scalar to add up: a number where that needs no wait for a device, else a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.item() if value.device.type == "cpu" else value.detach().double()


class LossModule(torch.nn.Module):
    """The task's loss as a module, so that wrappers wrap the loss and the task sees its model.

    Whatever wraps this (DDP, DataParallel) never comes between the task and the model: any
    method of the model may be used, and parameter names stay the model's own.
    """

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self._told = named(task, "loss")

    def forward(self, batch: Any, num_samples: int) -> LossParts:
        """(sum, weight) of one micro-batch of `num_samples` samples."""
        if batch is NO_SAMPLES:
            return self._zero(), 0.0
        total, weight = read_loss(self.task.loss(self.model, batch), num_samples, self._told)
        if not total.requires_grad and torch.is_grad_enabled():
            raise DtrainError(
                f"{self._told} returned a tensor without a graph (detached, computed under "
                "no_grad, or of a frozen model): it does not depend on any trainable parameter",
                code="task.loss-without-graph",
            )
        return total, weight

    def _zero(self) -> torch.Tensor:
        sums = [
            parameter.sum().reshape(())
            for parameter in self.parameters()
            if parameter.requires_grad
        ]
        # the gradient is exactly 0 even where a parameter is infinite
        return torch.stack([item.to(torch.float32) for item in sums]).sum() * 0
