"""The elements of torch's types, decoded without torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtrain.checkpoints.elements import different, distance, numbers


@pytest.mark.parametrize(
    "name",
    ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"],
)
def test_each_byte_is_the_number_that_torch_takes_it_for(name: str) -> None:
    raw = torch.arange(256, dtype=torch.uint8)
    expected = raw.view(getattr(torch, name)).double().numpy()
    np.testing.assert_array_equal(numbers(name, raw.numpy()), expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_each_pair_of_bytes_too(name: str) -> None:
    raw = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    expected = raw.view(getattr(torch, name)).double().numpy()
    np.testing.assert_array_equal(numbers(name, raw.numpy().view(np.uint8)), expected)


def test_large_integers_are_not_rounded() -> None:
    one, other = (np.array(v).view(np.uint8) for v in ([2**62, -(2**63)], [2**62 + 1, 2**63 - 1]))
    assert distance("int64", one[:8], other[:8]).largest == 1
    assert distance("int64", one, other).largest == 2.0**64


def test_bits_count_and_values_measure() -> None:
    nan, inf = float("nan"), float("inf")
    one, other = (
        np.array(values, dtype=np.float32).view(np.uint8)
        for values in ([0.0, 1.0, nan, inf], [-0.0, 1.0, nan, 1.0])
    )
    assert different(4, one, other).tolist() == [True, False, False, True]
    assert distance("float32", one[:12], other[:12]).largest == 0
    assert distance("float32", one, other).largest == inf
