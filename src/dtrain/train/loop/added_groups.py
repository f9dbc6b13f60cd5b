"""Parameter groups that are added during training, for example to unfreeze layers."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.errors import DtrainError


def watch_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuse groups that cannot be trained, at the line that adds them.

    All other groups are clipped, checked and saved, and a resume restores them.

    Args:
        optimizer: its `add_param_group` is replaced by one that checks the group first.
        model: the model with the parameters that it has when training begins.
    """
    known = {id(value) for value in model.parameters()}
    add = optimizer.add_param_group

    def added(group: dict[str, Any]) -> None:
        given = group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        for each in given:
            value = each[1] if isinstance(each, tuple) else each
            if id(value) not in known:
                raise DtrainError(
                    f"add_param_group() received a parameter of shape {tuple(value.shape)} that "
                    "the model did not have when training began. Ranks would not exchange its "
                    "gradient, and a resume would not find it. Make it in model()",
                    code="task.optimizer-foreign-parameters",
                )
        add({**group, "params": given})

    optimizer.add_param_group = added
