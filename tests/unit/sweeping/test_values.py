"""What `--sweep`, `--sweep-file` and `--sample` mean: the values of each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.sweeping.values import choices, choices_of
from support.errors import raises


def of(*texts: str, file: Path | None = None, sample: int | None = None) -> list[dict[str, Any]]:
    found = choices(texts, None if file is None else str(file), sample)
    return [{name: value.plain() for name, value in each.items()} for each in found]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", [1, 2]),
        ("a.b=1e-3,0.1", [0.001, 0.1]),
        ("a.b=[1, 2],[3]", [[1, 2], [3]]),
        ("a.b='x,y',\"z, w\",{k: 1, l: 2}", ["x,y", "z, w", {"k": 1, "l": 2}]),
        ("a.b=c=d", ["c=d"]),
        ("a.b=null,true", [None, True]),
        ("a.b=0..4", [0, 1, 2, 3, 4]),
        ("a.b=-1..1", [-1, 0, 1]),
        ("a.b=1..2,3", ["1..2", 3]),
    ],
)
def test_the_values_of_a_field(text: str, values: list[Any]) -> None:
    assert of(text) == [{"a.b": value} for value in values]


def test_hyphens_are_underscores_except_in_names_of_the_user() -> None:
    (found,) = of("train.virtual-shards=8", "args.my-lr=1", "launch.env.A-B=x")
    assert found == {"train.virtual_shards": 8, "args.my-lr": 1, "launch.env.A-B": "x"}


def test_the_last_field_changes_fastest() -> None:
    assert of("a=1,2", "b=x,y") == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]


@pytest.mark.parametrize(
    "text",
    ["a", "a=", "=1", "a=1,,2", "a=1,", "a=[1", "a='1,2", "a=4..0", "a=log(0..1)", "a={b"],
)
def test_a_text_that_is_no_sweep(text: str) -> None:
    with raises("usage.sweep-syntax", f"--sweep {text}"):
        of(text)


@pytest.mark.parametrize(
    ("texts", "code", "names"),
    [
        (("seed=1,1",), "usage.sweep-repeats", ["seed=1"]),
        (("seed=1", "seed=2"), "usage.sweep-repeats", ["seed"]),
        (("a-b.c-d=1", "a_b.c_d=2"), "usage.sweep-repeats", ["a_b.c_d"]),
        (("a=0.1..0.2",), "usage.sweep-range", ["--sample", "a=0.1..0.2"]),
        (("a=log(1..10)",), "usage.sweep-range", ["--sample"]),
        (("a=0..99999999999",), "usage.sweep-too-many", ["100000000000"]),
        (("a=0..999", "b=0..99"), "usage.sweep-too-many", ["100000"]),
    ],
)
def test_a_sweep_that_makes_no_sense(
    texts: tuple[str, ...], code: str, names: Sequence[str]
) -> None:
    with raises(code, *names):
        of(*texts)


def test_a_field_that_another_flag_sets_is_refused() -> None:
    with raises("usage.sweep-repeats", "seed"):
        choices(["seed=1,2"], None, None, given=["seed"])


def test_random_combinations_are_the_same_each_time_and_each_is_there_once() -> None:
    texts = ("args.lr=log(1e-5..1e-1)", "args.width=8,16,32", "seed=0..9", "args.p=0.1..0.2")
    found = of(*texts, sample=40)
    assert found == of(*texts, sample=40)
    assert found[:5] == of(*texts, sample=5)
    rates = [each["args.lr"] for each in found]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    # as many below 1e-3, the middle of the logarithms, as above it: 20 of 40, with sigma 3.2
    assert 8 < sum(rate < 1e-3 for rate in rates) < 32
    assert {each["args.width"] for each in found} == {8, 16, 32}
    assert all(type(each["seed"]) is int and 0 <= each["seed"] <= 9 for each in found)
    assert all(0.1 <= each["args.p"] <= 0.2 for each in found)


def test_a_sample_of_all_combinations_has_all() -> None:
    found = of("a=0..4", "b=x,y", sample=10)
    assert sorted((each["a"], each["b"]) for each in found) == [
        (a, b) for a in range(5) for b in "xy"
    ]


def test_whole_numbers_of_a_logarithmic_range() -> None:
    assert sorted(each["a"] for each in of("a=log(1..3)", sample=3)) == [1, 2, 3]


@pytest.mark.parametrize(("text", "sample"), [("a=0..4", 6), ("a=1,2", 3)])
def test_a_sample_of_too_many(text: str, sample: int) -> None:
    with raises("usage.sweep-too-few", f"--sample {sample}"):
        of(text, sample=sample)


def test_a_file_has_the_values_of_each_run(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("- {args.lr: 1e-3, seed: 3}\n- args.lr: 0.1\n  seed: 4\n")
    rows = [{"args.lr": 0.001, "seed": 3}, {"args.lr": 0.1, "seed": 4}]
    assert of(file=file) == rows
    both = of("args.width=8,16", file=file)
    assert both == [{"args.width": width, **row} for width in (8, 16) for row in rows]
    (located, _) = choices((), str(file), None)
    assert located["seed"].place.line == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("args.lr: 1\n", "1:1"),
        ("[]\n", "1:1"),
        ("- {a: 1}\n- 3\n", "2:3"),
        ("- {a: 1}\n- {}\n", "2:3"),
    ],
)
def test_a_file_that_is_no_list_of_values(tmp_path: Path, text: str, place: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with raises("sweep.file-shape", f"sweep.yaml:{place}"):
        of(file=file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with raises("file.not-found", "no.yaml"):
        of(file=tmp_path / "no.yaml")


def test_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("")
    with raises("sweep.file-shape", "sweep.yaml"):
        of(file=file)


def test_values_from_python() -> None:
    found = choices_of({"seed": range(2), "args.lr": [0.1]}, None, "sweep(fields={…})")
    plain = [{name: value.plain() for name, value in each.items()} for each in found]
    assert plain == [{"seed": 0, "args.lr": 0.1}, {"seed": 1, "args.lr": 0.1}]


@pytest.mark.parametrize("values", ["abc", [], 3])
def test_values_from_python_that_are_no_list(values: Any) -> None:
    with raises("usage.sweep-syntax", "seed"):
        choices_of({"seed": values}, None, "sweep(fields={…})")
