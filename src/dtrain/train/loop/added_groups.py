"""Parameter groups that a training adds to its optimizer, as it does when it unfreezes layers."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.errors import DtrainError


def watch_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuse groups that could not be trained, at the line that adds them.

    Others are followed: clipped, checked, saved, and restored by a resume.

    Args:
        optimizer: its `add_param_group` is replaced by one that looks.
        model: as training begins with it.
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
                    f"add_param_group() was given a parameter of shape {tuple(value.shape)} that "
                    "the model did not have when training began, so that no rank exchanges its "
                    "gradient and no resume finds it; make it in model()",
                    code="task.optimizer-foreign-parameters",
                )
        add({**group, "params": given})

    optimizer.add_param_group = added
