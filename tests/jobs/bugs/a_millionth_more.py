"""Rank 1's gradients are a millionth too large: in fp32 that is as small as rounding."""

import os

from task import Small

_model = Small.model


def with_hooks(self):
    model = _model(self)
    if os.environ.get("RANK") == "1":
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * (1 + 1e-6))
    return model


Small.model = with_hooks
