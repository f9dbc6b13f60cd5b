"""The parts of a checkpoint: shared evenly, each element once, and what comes back is what was."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import tempfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dtrain.errors import CheckpointError
from dtrain.train import digest
from dtrain.train.checkpoint import blocks, headers, parts, proof, tree
from dtrain.train.checkpoint.blocks import BlockFile, Cache, write_file
from dtrain.train.checkpoint.content import contribution, read_checkpoint
from dtrain.train.checkpoint.files import PROGRESS, STATE, aside, commit, new_save, part_name
from dtrain.train.checkpoint.headers import SAFETENSORS, StoredBytes, read_headers
from dtrain.train.checkpoint.leaves import refuse_unreadable
from dtrain.train.checkpoint.parts import Image, Piece, StoredTensor, share
from support.checkpoints import TENSORS, write_checkpoint
from support.errors import raises

MIB = 1 << 20
Shape = tuple[int, ...]

# -- sharing -----------------------------------------------------------------------------------

_ELEMENTS = [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
_SHAPES = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 4 * MIB)),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(st.integers(1, 9), st.integers(100, 900), st.integers(100, 900)),
)


def unsplittable(tensor: torch.Tensor) -> int:
    """Return the bytes of the largest part of a replica that is written by one rank."""
    return int(tensor.nbytes if tensor.nbytes < MIB else tensor.nbytes // tensor.shape[0])


@given(
    st.lists(st.tuples(st.sampled_from(_ELEMENTS), _SHAPES), max_size=30),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
@example([(torch.float32, ())] * 30, 4, None)
@example([(torch.float32, (5000, 5000)), (torch.bool, (0, 7))], 5, None)
def test_replicas_are_shared_evenly_and_each_element_is_written_once(
    given_ones: list[tuple[torch.dtype, Shape]], world_size: int, random: Any
) -> None:
    # without memory; but strides and offsets are real
    tensors = {
        f"t{i}": torch.empty(shape, dtype=dtype, device="meta")
        for i, (dtype, shape) in enumerate(given_ones)
    }
    shares = [share(tensors, rank, world_size) for rank in range(world_size)]
    found: dict[str, list[Piece]] = defaultdict(list)
    for piece in itertools.chain(*shares):
        found[piece.key].append(piece)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        end = 0
        for piece in found[key]:  # in the order of the ranks, which is that of the rows
            assert piece.shape == tuple(tensor.shape)
            assert piece.data.dtype == tensor.dtype
            assert piece.offsets == ((end, *(0,) * tensor.ndim)[: tensor.ndim])
            assert piece.data.shape[1:] == tensor.shape[1:]
            assert piece.data.storage_offset() == (end * tensor.stride(0) if tensor.ndim else 0)
            end += piece.data.shape[0] if tensor.ndim else 1
        assert end == (tensor.shape[0] if tensor.ndim else 1)
        assert len(found[key]) == 1 or tensor.nbytes >= MIB
    even = sum(each.nbytes for each in tensors.values()) / world_size
    largest = max(map(unsplittable, tensors.values()), default=0)
    for pieces in shares:
        assert abs(sum(piece.bytes for piece in pieces) - even) <= largest + 1


# -- round trips -------------------------------------------------------------------------------


def write(final: Path, state: Mapping[str, Any], world_size: int) -> None:
    """Write a checkpoint of replicas, as so many ranks do it."""
    contents = [contribution(state, {}, {}, rank, world_size) for rank in range(world_size)]
    save = new_save()
    folder = aside(final, save)
    folder.mkdir(parents=True)
    entries = {
        part_name(rank): write_file(folder / part_name(rank), each.image.buffers())
        for rank, each in enumerate(contents)
    }
    commit(final, save, entries, contents[0].texts, {})


def round_trip(folder: Path, model: Any, world_size: int = 1) -> Any:
    final = folder / f"step-{world_size:08d}"
    write(final, {"model": model}, world_size)
    return read_checkpoint(final)[0]["model"]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(parts.as_bytes(tensor))


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert bits(one) == bits(other)


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Return a tensor of any bits: with NaNs of any payload, infinities, denormals."""
    draw = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    drawn = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=draw)
    return drawn.to(torch.uint8).view(dtype).view(shape)


def _is_quantized(dtype: torch.dtype) -> bool:
    return "qint" in str(dtype) or "quint" in str(dtype)


DTYPES = sorted(
    {each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str
)  # fmt: skip
DENSE = [each for each in DTYPES if not _is_quantized(each)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_type_comes_back(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(DENSE) > 35
    monkeypatch.setattr(parts, "_SPLIT_FROM", 16)
    model = {str(each): random_bits(each, 7, 5, seed=i) for i, each in enumerate(DENSE)}
    model |= {f"one {each}": tensor[2, 3] for each, tensor in model.items()}
    model |= {f"empty {each}": torch.empty(0, 3, dtype=each) for each in DENSE}
    found = round_trip(tmp_path, model, world_size)
    assert found.keys() == model.keys()
    for name, tensor in model.items():
        assert_same_bits(found[name], tensor)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_any_layout_of_memory_comes_back(world_size: int, tmp_path: Path) -> None:
    image_like = torch.randn(6, 3, 40, 50).to(memory_format=torch.channels_last)
    large = torch.randn(700, 900)
    number = torch.randn(5, dtype=torch.complex64)
    model = {
        "transposed": large.t(), "every other": large[::2, 1::3], "column": large[:, 0],
        "channels last": image_like, "expanded": torch.randn(3, 1).expand(3, 400_000),
        "conjugate": number.conj(), "number": number, "negative": torch._neg_view(large[0]),
        "imaginary": number.imag, "negative imaginary": number.conj().imag,
        "backwards": nn_parameter(large.flip(0)),
    }  # fmt: skip
    found = round_trip(tmp_path, model, world_size)
    for name, tensor in model.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


def nn_parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(tensor)


def test_what_is_one_tensor_is_written_once(tmp_path: Path) -> None:
    tied = torch.randn(300, 300)
    model = {
        "in": tied, "out": tied, "same memory": tied.view(300, 300), "detached": tied.detach(),
        "flat": tied.view(-1), "bits": tied.view(torch.int32), "transposed": tied.t(),
        "half": tied[:150], "e1": torch.empty(0), "e2": torch.empty(0),
    }  # fmt: skip
    split = tree.split({"model": model})
    assert list(split.tensors) == [
        f"model/{name}" for name in ("in", "flat", "bits", "transposed", "half", "e1", "e2")
    ]
    found = round_trip(tmp_path, {"in": tied, "out": tied}, 2)
    assert torch.equal(found["in"], tied)
    assert torch.equal(found["out"], tied)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.safetensors")]
    assert tied.nbytes <= sum(sizes) < 1.1 * tied.nbytes


def test_names_that_collide_are_told_apart(tmp_path: Path) -> None:
    rows = torch.arange(600_000.0).view(6, -1)
    model = {
        "a/b": rows + 1, "a": {"b": rows + 2, "b'": rows + 3, "b[0:3,0:100000]": rows[:3] + 4},
        "a/b'": rows + 5, "": {"a/b": rows + 6}, "\udc80": rows + 7, "\udcff x": rows + 8,
        1: rows + 9, "1": rows + 10, 1.5: rows + 11,
    }  # fmt: skip
    found = round_trip(tmp_path, model, 2)
    flat = [(found, model), (found["a"], model["a"]), (found[""], model[""])]
    for one, other in flat:
        assert list(one) == list(other)
        for name, tensor in other.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(one[name], tensor), name


# -- boxes -------------------------------------------------------------------------------------

Box = tuple[tuple[int, int], ...]
"""In each dimension the first index, and the one after the last."""


@st.composite
def boxes_of(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Cut a tensor into boxes, and those again."""
    cut: list[Box] = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 8))):
        box = cut.pop(draw(st.integers(0, len(cut) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        low, high = box[dim]
        middle = draw(st.integers(low, high))
        cut += [(*box[:dim], pair, *box[dim + 1 :]) for pair in ((low, middle), (middle, high))]
    return [box for box in cut if all(low < high for low, high in box)]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Shape, list[Box], Box]:
    """Draw a shape, the boxes that are written, and the one that is read."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    pairs = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, draw(boxes_of(shape)), tuple((low, high) for low, high in pairs)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in box)


@contextlib.contextmanager
def stored(pieces: list[list[Piece]]) -> Iterator[dict[str, StoredBytes]]:
    """Write files of pieces, and open them."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        files: list[BlockFile] = []
        cache = Cache()
        paths = [Path(name) / part_name(index) for index in range(len(pieces))]
        for path, each in zip(paths, pieces, strict=True):
            file = BlockFile(path, write_file(path, Image(each).buffers()), cache)
            stack.callback(file.close)
            files.append(file)
        yield read_headers(files)


@given(
    cut_tensors(),
    st.sampled_from([torch.float32, torch.uint8, torch.complex128]),
    st.integers(1, 3),
    st.sampled_from([64, 1024, blocks.BLOCK]),
    st.sampled_from([1, 100, headers._AT_ONCE]),
)
@settings(max_examples=60)
def test_a_box_is_read_from_any_other_boxes(
    cut: tuple[Shape, list[Box], Box], dtype: torch.dtype, files: int, block: int, at_once: int
) -> None:
    shape, written, wanted = cut
    tensor = random_bits(dtype, *shape)
    pieces: list[list[Piece]] = [[] for _ in range(files)]
    for index, box in enumerate(written):
        offsets = tuple(low for low, _ in box)
        pieces[index % files].append(Piece("t", shape, offsets, tensor[slices(box)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        patch.setattr(parts, "BLOCK", block)
        patch.setattr(headers, "_AT_ONCE", max(16, at_once))  # at least an element
        with stored(pieces) as found:
            assert b"".join(map(bytes, found["t"].pieces())) == bits(tensor)
            opened = StoredTensor(found["t"])
            target = torch.empty(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
            assert_same_bits(opened.read_into(target), tensor)
            assert_same_bits(opened.read(), tensor)
            expected = tensor[slices(wanted)]
            here, offsets = torch.empty_like(expected), tuple(low for low, _ in wanted)
            copied = sum(opened._copy(chunk, here, offsets) for chunk in opened.chunks)
            assert copied == expected.numel()
            assert_same_bits(here, expected)


def test_it_is_cast_to_the_type_of_the_target() -> None:
    tensor = torch.randn(4, 6)
    with stored([[Piece("t", (4, 6), (0, 0), tensor)]]) as found:
        half = StoredTensor(found["t"]).read_into(torch.empty(4, 6, dtype=torch.bfloat16))
        assert torch.equal(half, tensor.bfloat16())
        like = StoredTensor(found["t"]).read_like(torch.empty(4, 6, dtype=torch.float64))
        assert_same_bits(like, tensor)


@pytest.mark.parametrize(
    ("offsets", "elements"),
    [([0], "12 elements"), ([2, 1], "6 elements"), ([0, 1, 1, 2], "-6 elements")],
)
def test_a_part_that_is_missing_or_there_twice(offsets: list[int], elements: str) -> None:
    tensor = torch.randn(3, 6)
    pieces = [Piece("a/t", (3, 6), (row, 0), tensor[row : row + 1]) for row in offsets]
    with stored([[each] for each in pieces]) as found:
        with raises("checkpoint.damaged-file", elements, "a/t", kind=CheckpointError):
            StoredTensor(found["a/t"]).read()
        with raises("checkpoint.damaged-file", "a/t", kind=CheckpointError):
            list(found["a/t"].pieces())


# -- safetensors -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_the_library_of_safetensors_reads_the_same(tmp_path: Path) -> None:
    model: dict[str, Any] = {
        str(each): random_bits(each, 7, 5, seed=i) for i, each in enumerate(DENSE)
    }
    model |= {"none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    rows = torch.randn(1000, 500)
    write(tmp_path / "step-1", {"model": {**model, "rows": rows}}, 2)
    read: dict[str, torch.Tensor] = {}
    for rank in range(2):
        with safe_open(tmp_path / "step-1" / part_name(rank), framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            names = list(file.keys())
            read |= {name.removeprefix("model/"): file.get_tensor(name) for name in names}
    cut = sorted(name for name in read if name.startswith("rows["))
    assert torch.equal(torch.cat([read.pop(name) for name in cut]), rows)
    assert len(cut) == 2
    assert read.keys() == model.keys()
    for name, tensor in model.items():
        if str(tensor.dtype).removeprefix("torch.") in SAFETENSORS:
            assert_same_bits(read[name], tensor)
        else:
            assert read[name].dtype == torch.uint8
            assert bits(read[name]) == bits(tensor)


# -- proof -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("size", [0, 1, 5, proof._CHUNK, proof._CHUNK + 1, 2 * proof._CHUNK + 3])
def test_the_sum_of_the_bytes_is_that_of_the_tensor(size: int, dtype: torch.dtype) -> None:
    tensor = random_bits(dtype, size)
    mine = proof.weighted_sum(parts.as_bytes(tensor), tensor.element_size())
    assert mine.tolist() == digest.weighted_sum(tensor).tolist()


def test_the_sum_of_a_device_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_bits(torch.int16, proof._CHUNK + 9)
    monkeypatch.setattr(digest, "_CHUNK", 1000)
    mine = proof.weighted_sum(parts.as_bytes(tensor), tensor.element_size())
    assert mine.tolist() == digest.weighted_sum(tensor).tolist()


def live_digest(tensor: torch.Tensor, method: str) -> str:
    """Return a digest of a tensor, as the CPU or a GPU computes it."""
    if method == "xxh3":
        return digest.texts_of_each([tensor])[0]
    words = digest.weighted_sum(tensor).numpy().tobytes()
    return f"wsum:{xxhash.xxh3_64_intdigest(words):016x}"


@pytest.mark.parametrize("method", ["xxh3", "sum"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.complex128])
def test_one_flipped_bit_of_a_copy_is_found(dtype: torch.dtype, method: str) -> None:
    tensor = random_bits(dtype, 33)
    piece = parts.Piece("w", (33,), (0,), tensor).described(live_digest(tensor, method))
    data = bytearray(parts.as_bytes(tensor))
    proof.require_same(memoryview(data), piece)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with raises("checkpoint.copy-differs", "copy of w ", kind=CheckpointError):
            proof.require_same(memoryview(data), piece)
        data[bit // 8] ^= 1 << bit % 8
    proof.require_same(memoryview(data), piece)


# -- damage ------------------------------------------------------------------------------------


def test_a_flipped_bit_of_any_byte_of_any_file_is_found(tmp_path: Path) -> None:
    final = tmp_path / "step-00000001"
    state = {"model": {"w": torch.arange(9.0), "b": torch.ones(2)}, "extras": {"n": (1, 2.5)}}
    write_checkpoint(final, state, {"step": 1}, {"world_size": 1})
    names = {path.name for path in final.iterdir()}
    assert names == {TENSORS, STATE, PROGRESS, "manifest.json"}
    for name in names:
        path = final / name
        good = path.read_bytes()
        for index, byte in enumerate(good):
            path.write_bytes(
                good[:index] + bytes([byte ^ 1 << (index + len(name)) % 8]) + good[index + 1 :]
            )
            try:
                found, progress = read_checkpoint(final)
            except CheckpointError:
                continue
            assert name == "manifest.json"
            assert good[index : index + 1].isspace()
            assert progress == {"step": 1}
            assert same(found, state)
        path.write_bytes(good)
    assert same(read_checkpoint(final)[0], state)


# -- trees -------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, and of the same types, in the same order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, np.ndarray | np.generic):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, dict):
        return same([*one.items()], [*other.items()])
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other if isinstance(one, set) else repr(one) == repr(other)


_SCALARS = [np.float32, np.float64, np.int8, np.int64, np.uint16, np.bool_, np.complex64]
_NUMPY: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(_SCALARS).map(lambda kind: kind(1.1)),
    st.just(np.float64("nan")),
    st.tuples(st.sampled_from(_SCALARS), st.lists(st.integers(1, 3), max_size=3)).map(
        lambda drawn: np.full(drawn[1], 3, dtype=drawn[0])
    ),
)
_TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["$tensor", "$tuple", "$", "$$x", "$torch", "\udc80", "é", "a/b", "\0", "NaN"]),
)
_PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**300), st.floats(), st.just(-0.0), _TEXTS
)
_LEAVES = st.one_of(
    _PLAIN,
    _NUMPY,
    st.lists(st.integers(0, 9)).map(Counter),
    st.sets(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.lists(st.integers(0, 3), max_size=3).map(torch.zeros),
    st.just(torch.Size([2, 3])),
    st.binary(min_size=1, max_size=4),
)
_KEYS = st.one_of(_TEXTS, st.integers(), st.booleans(), st.none(), st.tuples(_TEXTS, st.integers()))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keyed = st.one_of(
        st.dictionaries(_TEXTS, inner, max_size=4), st.dictionaries(_KEYS, inner, max_size=4)
    )
    listed = st.lists(inner, max_size=4)
    return st.one_of(keyed, keyed.map(OrderedDict), listed, listed.map(tuple))


TREES = st.recursive(_LEAVES, _containers, max_leaves=12)


@given(TREES)
@settings(max_examples=200)
@example({"$tensor": 1, "x": {"$tuple": [1]}})
@example([{"$ordered": {}}, {"": {}}, {1: {"1": 2}}, OrderedDict(), (), [[]], ((1,),)])
@example({float("nan"): float("inf"), -math.inf: (float("nan"), -0.0)})
@example({True: 1, "True": 2, None: 3, "null": 4, 1.5: 5})
def test_a_tree_comes_back_with_its_types(value: Any) -> None:
    refuse_unreadable(value, "value")
    split = tree.split(value)
    text = json.dumps(split.described, allow_nan=False)
    assert same(tree.join(json.loads(text), split.tensors.__getitem__), value)


def test_trees_come_back_from_a_file(tmp_path: Path) -> None:
    deep: Any = "end"
    for level in range(100):
        deep = {"next": [deep]} if level % 2 else (deep,)
    value = {
        "deep": deep, "file of another system": "\udc80", "\udc81": 1, "$x": float("nan"),
        "large": 10**4000, "set": {1, "a"}, "count": Counter("aab"), "n": np.float32(0.1),
        (1, "a"): OrderedDict([(2, 1), (1, 2)]), "same": [torch.ones(2)] * 2,
    }  # fmt: skip
    assert same(round_trip(tmp_path, value), value)


@pytest.mark.parametrize("described", [{"$new": 1}, {"$tensor": "gone"}, {"$torch": "AAAA"}])
def test_what_is_no_such_tree_is_damaged(described: Any, tmp_path: Path) -> None:
    final = tmp_path / "step-00000001"
    content = contribution({}, {}, {}, 0, 1)
    save = new_save()
    aside(final, save).mkdir()
    texts = {**content.texts, STATE: json.dumps({"model": [described]})}
    commit(final, save, {}, texts, {})
    with raises("checkpoint.damaged-file", STATE, kind=CheckpointError):
        read_checkpoint(final)
