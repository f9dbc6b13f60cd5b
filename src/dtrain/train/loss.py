"""The loss contract: every result of a task's loss becomes a sum and its weight."""

from __future__ import annotations

from numbers import Real
from typing import Any, Final

import torch

from dtrain.errors import DtrainError
from dtrain.task import Loss, Task
from dtrain.train.contract import described, named

NO_SAMPLES: Final = object()
"""Used in place of a batch: the loss is zero and depends on every parameter.

A rank without samples joins DDP's reduction with it. No sample is invented, and no code of the task
runs."""

LossParts = tuple[torch.Tensor, float | torch.Tensor]
"""(sum with its graph, weight), both scalars."""


def read_loss(value: Any, num_samples: int, origin: str = "loss()") -> LossParts:
    """Return the loss that a task returned, as (sum, weight).

    Args:
        value: a `Loss`, or a scalar that is the mean over the samples of the batch.
        num_samples: the number of samples in the batch.
        origin: the method that returned it, for the message.

    Raises:
        DtrainError: it is neither.
    """
    if isinstance(value, Loss):
        weight = value.weight
        if not isinstance(weight, int | float):
            weight = _scalar(weight, f"{origin} returned a Loss whose weight is").detach()
        return _scalar(value.sum, f"{origin} returned a Loss whose sum is"), weight
    return _scalar(value, f"{origin} returned") * num_samples, float(num_samples)


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
            "(with mean for a scalar loss, with sum for Loss)",
            code="task.loss-not-scalar",
        )
    if tensor.dtype in (torch.float16, torch.bfloat16):  # 8 bits are too few for 100 losses
        tensor = tensor.float()
    return tensor if tensor.dim() == 0 else tensor.reshape(())


def in_fp64(value: float | torch.Tensor) -> float | torch.Tensor:
    """Return a scalar to add up: a number if no device must be waited for, otherwise a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.item() if value.device.type == "cpu" else value.detach().double()


class LossModule(torch.nn.Module):
    """The task's loss as a module, so that wrappers wrap the loss and the task sees its model.

    A wrapper (DDP, DataParallel) is never between the task and the model. So the task may call any
    method of the model, and the names of parameters do not change.
    """

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self._origin = named(task, "loss")

    def forward(self, batch: Any, num_samples: int) -> LossParts:
        """Return (sum, weight) of one micro-batch of `num_samples` samples."""
        if batch is NO_SAMPLES:
            return self._zero(), 0.0
        total, weight = read_loss(self.task.loss(self.model, batch), num_samples, self._origin)
        if not total.requires_grad and torch.is_grad_enabled():
            raise DtrainError(
                f"{self._origin} returned a tensor without a graph (detached, computed under "
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
