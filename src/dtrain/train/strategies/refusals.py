"""What strategies of several processes cannot train."""

from __future__ import annotations

import torch

from dtrain.errors import DtrainError


def refuse_sparse(model: torch.nn.Module, strategy: str) -> None:
    """Make sure that no layer makes sparse gradients.

    Raises:
        DtrainError: names the first that does.
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(
            module, torch.nn.Embedding | torch.nn.EmbeddingBag
        ):
            raise DtrainError(
                f"{name} makes sparse gradients, which strategy {strategy!r} does not reduce; "
                "build it with sparse=False, or use strategy 'single'"
            )
