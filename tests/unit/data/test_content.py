"""What samples hold: equal digests for equal samples, and the first place that differs."""

from __future__ import annotations

import collections
import dataclasses
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.train.data.content import digest, first_difference, leaves


class Plain:
    """An object of a user's."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._cache = object()


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


class Image:
    """As one of PIL's."""

    def __init__(self, value: int) -> None:
        self._pixels = np.full((2, 2), value, np.uint8)

    @property
    def __array_interface__(self) -> Any:
        return self._pixels.__array_interface__


Named = collections.namedtuple("Named", "a b")


def samples() -> list[Any]:
    """All unlike each other."""
    return [
        torch.zeros(3),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, 1),
        torch.zeros(0),
        torch.tensor([0.0, -0.0, 0.0]),
        torch.arange(6).reshape(2, 3),
        torch.arange(6).reshape(3, 2).t(),
        torch.zeros(2, dtype=torch.complex64),
        np.zeros(3),
        np.zeros(3, np.float32),
        np.zeros((2, 3), order="F"),
        np.array(["a", "b"]),
        np.array(["2026-11-01"], dtype="M8[D]"),
        np.array([1, "a", None], dtype=object),
        np.zeros(2, np.dtype([("a", "i4"), ("b", "f8")])),
        np.float32(3),
        np.longdouble(1) / 3,
        3,
        3.0,
        True,
        None,
        "3",
        b"3",
        [1, 2, 3],
        [1, 2, 4],
        (1, 2, 3),
        [1, "2", 3],
        [[1, 2], 3],
        {"x": 1, "y": 2},
        {"x": 2, "y": 1},
        {1, 2},
        Named(1, 2),
        Pair(1, 2),
        Plain(1),
        Plain(2),
        Image(7),
        Image(8),
    ]


def test_equal_samples_have_equal_digests_and_others_have_others() -> None:
    first, second = ([digest(each) for each in samples()] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)
    assert 0 not in first


def test_neither_the_process_nor_the_layout_in_memory_matters() -> None:
    code = "from dtrain.train.data.content import digest\nprint(digest([set('abcdefgh'), 'x']))"
    run = [sys.executable, "-c", code]  # with other hashes of text, and so another order of sets
    out = subprocess.run(run, env={"PYTHONHASHSEED": "1"}, capture_output=True, check=True).stdout
    assert int(out) == digest([set("hgfedcba"), "x"])
    table = torch.arange(12.0).reshape(3, 4)
    assert digest(table.t()) == digest(table.t().contiguous())
    assert digest(table.requires_grad_()) == digest(table.detach())


@pytest.mark.parametrize("sample", [object(), io.BytesIO(b"x"), torch.zeros(2).to_sparse(), print])
def test_what_cannot_be_read_counts_by_its_class(sample: Any) -> None:
    assert digest(sample) == 0
    assert digest([sample, 1]) == digest([sample, 1]) != 0


def test_parts_that_lead_to_one_another_end() -> None:
    parts = [Plain(None) for _ in range(30)]
    for part in parts:
        part.value = [each for each in parts if each is not part]
    assert digest(parts) == digest(parts)


def test_a_sample_that_holds_itself_ends() -> None:
    one: list[Any] = [1, "a"]
    one.append(one)
    assert digest(one) != digest([1, "a"])


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ((torch.tensor([0, 0.501]), 3), (torch.tensor([0, 0.5]), 3), ("[0][1]", "0.501", "0.5")),
        ({"a": np.zeros((2, 3))}, {"a": np.eye(2, 3)}, ("['a'][0, 0]", "0.0", "1.0")),
        ([1, 2, 3], [1, 2, 4], ("[2]", "3", "4")),
        ({"text": "x"}, {"text": "y"}, ("['text']", "'x'", "'y'")),
        (torch.zeros(2), torch.zeros(3), ("", "torch.float32[2]", "torch.float32[3]")),
        (torch.tensor(1), torch.tensor(2), ("", "1", "2")),
        (torch.ones(1).bfloat16(), torch.zeros(1).bfloat16(), ("[0]", "1.0", "0.0")),
        (Plain([1, "a"]), Plain([1, "b"]), (".value[1]", "'a'", "'b'")),
        ({"a": 1}, {"b": 1}, ("", "'a'", "'b'")),
        ([1, "a"], [1, "a"], None),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(ours: Any, theirs: Any, where: Any) -> None:
    assert first_difference(list(leaves(ours)), list(leaves(theirs))) == where
