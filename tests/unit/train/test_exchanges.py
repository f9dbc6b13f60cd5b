"""What ranks give one another comes back as it was, and never runs anything."""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.train.data.exactly_once import Fault
from dtrain.train.data.fetch import Probed
from dtrain.train.data.overlap import Kept
from dtrain.train.packed import pack, unpack
from dtrain.train.seeding import RandomState
from dtrain.train.strategies.lent import taken
from support.errors import raises

CPU = torch.device("cpu")

plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False)
)  # fmt: skip
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers())
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(keys, inner)
        | st.lists(inner).map(tuple)
        | st.frozensets(keys).map(set)
    ),
)


def types(value: Any) -> Any:
    """The value with the type of each of its parts."""
    if isinstance(value, dict):
        return dict, [(types(k), types(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [types(each) for each in value]
    return type(value), value


@settings(max_examples=30)
@given(values)
def test_plain_values_and_containers(value: Any) -> None:
    assert types(unpack(pack(value))) == types(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones((2, *shape), dtype=dtype)[:, ...][1]
    back = unpack(pack(tensor))
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3)[:, ::2], np.zeros((0, 2), "f4"), np.array("text"), np.float64(3)],
)
def test_arrays_and_numbers_of_numpy(array: Any) -> None:
    back = unpack(pack(array))
    assert (type(back), back.dtype, back.shape) == (type(array), array.dtype, array.shape)
    assert np.array_equal(back, array)


def test_what_is_not_finite() -> None:
    nan, high, low = unpack(pack([math.nan, math.inf, -math.inf]))
    assert math.isnan(nan)
    assert (high, low) == (math.inf, -math.inf)


def test_classes_of_our_own() -> None:
    kept = Kept(2, 3, np.array([2**64 - 1], np.uint64), np.array([-1]))
    probed = Probed((2**64 - 1,), (1,), ("rng",))
    fault = Fault(None, range(3, 9, 2), "wrong")
    back, *others = unpack(pack((kept, probed, fault)))
    assert others == [probed, fault]
    assert (back.digests.tolist(), back.positions.dtype) == ([2**64 - 1], np.int64)


def test_the_state_of_all_generators() -> None:
    state = RandomState.capture()
    back = RandomState.from_saved(unpack(pack(state.to_saved())))
    assert back.python == state.python
    assert torch.equal(back.torch, state.torch)


@pytest.mark.parametrize("value", [object(), Path("x"), np.array([object()]), {"a": [print]}])
def test_what_cannot_be_exchanged_is_refused_where_it_is(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot exchange"):
        pack(value)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Started(Bomb):
    def __reduce__(self) -> Any:
        return subprocess.Popen, (["mkdir", str(self.path)],)


JUNK = [
    b"", b"{", b"\x80\x04.", b'{"os.system": ["x"]}', b'{"dict": 1}', b'{"a": 1, "b": 2}', b"{}",
    b'{"array": ["O", [1], "AAAAAAAAAAA="]}', b'{"array": ["<i8", [-5], "AAAA"]}',
    b'{"tensor": ["torch.load", [1], ""]}', b'{"Kept": [1]}', b'{"bytes": 3}',
]  # fmt: skip


@pytest.mark.parametrize("data", JUNK)
def test_junk_is_no_value(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(data)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        unpack(pickle.dumps(Bomb(tmp_path / "made")))
    assert not (tmp_path / "made").exists()


class Pair(NamedTuple):
    inputs: torch.Tensor
    names: list[str]


@dataclass
class Batch:
    inputs: torch.Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    pass


class Custom:
    def __init__(self) -> None:
        self.inputs = torch.ones(2)


def lent(batch: Any) -> bytes:
    file = io.BytesIO()
    torch.save((batch, 2), file)
    return file.getvalue()


ONE = torch.ones(2)
BATCHES = [
    (ONE, ONE), {"x": ONE, "ids": ["a", 1]}, OrderedDict(x=ONE), Pair(ONE, ["a"]), Batch(ONE),
    Encoding(x=ONE), np.ones(3),
]  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES, ids=lambda each: type(each).__name__)
def test_a_batch_that_is_lent(batch: Any, tmp_path: Path) -> None:
    back, num_samples = taken(lent(batch), CPU, tmp_path)
    assert num_samples == 2
    assert type(back) is type(batch)
    assert repr(back) == repr(batch)


def test_classes_of_the_tasks_own_are_lent(tmp_path: Path) -> None:
    back, _ = taken(lent(Custom()), CPU, Path(__file__).parent)
    assert torch.equal(back.inputs, ONE)
    with raises("strategy.batch-cannot-be-lent", "Custom"):
        taken(lent(Custom()), CPU, tmp_path)


@pytest.mark.parametrize("kind", [Bomb, Started])
@pytest.mark.parametrize("code", [Path("/"), Path(__file__).parent])
def test_nothing_is_run_to_build_a_batch(kind: type[Bomb], code: Path, tmp_path: Path) -> None:
    with raises("strategy.batch-cannot-be-lent"):
        taken(lent([kind(tmp_path / "made")]), CPU, code)
    assert not (tmp_path / "made").exists()
