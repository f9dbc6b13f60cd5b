"""Whether gradients are numbers."""

from __future__ import annotations

import pytest
import torch

from dtrain.train.checks.spoilt import all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_element_is_seen(value: float, dtype: torch.dtype) -> None:
    tensors = [torch.randn(7), torch.randn(3, 5).to(dtype), torch.empty(0)]
    assert all_finite(tensors)
    tensors[1][2, 4] = value
    assert not all_finite(tensors)


def test_large_numbers_are_numbers() -> None:
    assert all_finite([torch.full((9,), 3e38)]), "whose norm overflows"
    assert all_finite([])
