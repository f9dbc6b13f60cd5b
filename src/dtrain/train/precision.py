"""The number format of forward passes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    def __init__(self, precision: str, device: torch.device) -> None:
        self._device = device.type
        self._dtype = _AUTOCAST.get(precision)

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any]
        context = torch.autocast(self._device, dtype=self._dtype)
        return context
