"""The digests see every kind of change, on the CPU's way and on the GPU's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dtrain.train import digest

TRIALS = 300
SIZE = 4096


def flip(flat: torch.Tensor, i: int, j: int) -> None:
    digest.as_integers(flat)[i] ^= 1 << (j % 31)


def flip_two_alike(flat: torch.Tensor, i: int, j: int) -> None:
    for place in (i, (i + 1) % SIZE):
        digest.as_integers(flat)[place] ^= 1 << (j % 31)


def swap(flat: torch.Tensor, i: int, j: int) -> None:
    j = j if flat[i] != flat[j] else (i + 1) % SIZE
    flat[[i, j]] = flat[[j, i]]


def swap_rows(flat: torch.Tensor, i: int, j: int) -> None:
    rows = flat.view(-1, 64)
    i, j = i % 64, (i + 1 + j % 63) % 64
    rows[[i, j]] = rows[[j, i]]


def negate(flat: torch.Tensor, i: int, j: int) -> None:
    flat[i] = -flat[i]


def negate_zero(flat: torch.Tensor, i: int, j: int) -> None:
    flat[i] = -0.0 if flat[i] == 0 else 0.0


def other_nan(flat: torch.Tensor, i: int, j: int) -> None:
    digest.as_integers(flat)[i] = 0x7FC00001 + j


def weighted(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(digest.weighted_sum(tensor).tolist())


def xxh3(tensor: torch.Tensor) -> int:
    return digest.of_all([tensor])


@pytest.mark.parametrize("way", [xxh3, weighted])
@pytest.mark.parametrize(
    "change", [flip, flip_two_alike, swap, swap_rows, negate, negate_zero, other_nan]
)
def test_every_change_is_seen(
    way: Callable[[torch.Tensor], object], change: Callable[[torch.Tensor, int, int], None]
) -> None:
    draw = torch.Generator().manual_seed(5)
    tensor = torch.randn(SIZE, generator=draw)
    before = way(tensor)
    seen = 0
    for _ in range(TRIALS):
        i, j = torch.randint(SIZE, (2,), generator=draw).tolist()
        changed = tensor.clone()
        change(changed, i, j)
        seen += way(changed) != before
        assert way(tensor.clone()) == before
    assert seen == TRIALS


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
     torch.uint8, torch.bool, torch.complex64],
)  # fmt: skip
def test_every_type_has_a_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(10).to(dtype)
    other = tensor.clone()
    other[3] = 0
    for way in (xxh3, weighted):
        assert way(tensor) != way(other)
        assert way(tensor) == way(tensor.clone())


def test_a_tensor_that_is_not_contiguous_has_the_digest_of_its_copy() -> None:
    tensor = torch.randn(8, 6).t()
    assert xxh3(tensor) == xxh3(tensor.contiguous())
    assert weighted(tensor) == weighted(tensor.contiguous())


def test_empty_tensors() -> None:
    assert digest.of_each([torch.empty(0, 3)]) == digest.of_each([torch.empty(0)])
    assert weighted(torch.empty(0)) == (0, 0)


def test_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = weighted(tensor)
    monkeypatch.setattr(digest, "_CHUNK", 64)
    assert weighted(tensor) == whole
