"""Which runs match, and in which order."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dtrain.api.run import runs as found_by
from dtrain.searching import fields
from dtrain.searching.index import Entry, entries
from dtrain.searching.query import select, time_of
from support.errors import raises
from support.written_runs import TRAIN, write_run

NOW = time.time()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: a has ended long ago, b has failed, c has not evaluated, d runs."""
    folder = tmp_path_factory.mktemp("runs")
    two = {"launch": {"nodes": "1:2"}, "strategy": "ddp"}
    write_run(folder, "a", job={"seed": 1}, metrics={"eval": {"acc": 0.5}, "train": {"lr": 0.01}})
    write_run(
        folder, "b", state="failed", job={"seed": 2, **two}, started=NOW - 3600,
        metrics={"eval": {"acc": 0.9}, "train": {"lr": 0.001, "loss": float("nan")}},
    )  # fmt: skip
    write_run(
        folder, "c", started=NOW - 1800, job={"args": {"lr": 0.1, "kind": "tiny", "big": True}}
    )
    write_run(folder, "d", state=None, job={"train": {**TRAIN, "precision": "bf16"}})
    return folder


@pytest.fixture(scope="module")
def known(runs: Path) -> list[Entry]:
    return entries(runs)


def ids(found: list[Entry]) -> str:
    return "".join(entry.run.id for entry in found)


@pytest.mark.parametrize(
    ("condition", "matching"),
    [
        ("seed=1", "a"),
        ("seed != 1", "bcd"),
        ("seed==2", "b"),
        ("launch.nodes>=2", "b"),
        ("nodes>=2", "b"),
        ("ranks=2", "b"),
        ("eval.acc>0.5", "b"),
        ("eval.acc>=5e-1", "ab"),
        ("eval.acc!=0.5", "b"),  # not a run without it
        ("train.lr<0.01", "b"),
        ("train.loss<1", ""),  # NaN
        ("args.lr<0.5", "c"),
        ("args.kind=tiny", "c"),
        ("args.big=true", "c"),
        ("train.precision=bf16", "d"),
        ("STATE=running", "d"),
        ("strategy<3", ""),
        ("checkpoint.init_from=x", ""),
        ("state=", ""),
    ],
)
def test_a_condition_holds_for_runs_with_such_a_value(
    known: list[Entry], condition: str, matching: str
) -> None:
    assert ids(select(known, where=[condition])) == matching


def test_all_conditions_must_hold(known: list[Entry]) -> None:
    assert ids(select(known, where=["eval.acc>0", "seed>1"])) == "b"
    assert ids(select(known, states=["succeeded,running"], where=["seed<1"])) == "cd"
    assert ids(select(known, states=["failed", "running"])) == "bd"


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("seed", "usage.where-syntax", ("'seed'",)),
        ("=3", "usage.where-syntax", ()),
        ("train.lr<fast", "usage.where-syntax", ("'fast'",)),
        ("train.lr<nan", "usage.where-syntax", ("'nan'",)),
        ("acc>1", "usage.unknown-name", ("'eval.acc'",)),
        ("train.step=1", "usage.unknown-name", ("'train.steps'",)),
        ("train=1", "usage.unknown-name", ()),
    ],
)
def test_what_has_no_meaning_is_refused(
    known: list[Entry], text: str, code: str, names: tuple[str, ...]
) -> None:
    with raises(code, *names):
        select(known, where=[text])


def test_unknown_states_are_refused_with_all_states(known: list[Entry]) -> None:
    with raises("usage.invalid-value", "'fail'", "failed", "damaged"):
        select(known, states=["running,fail"])


def test_only_runs_started_since_then(known: list[Entry]) -> None:
    assert ids(select(known, since="45m")) == "cd"
    assert ids(select(known, since="2h")) == "bcd"
    assert ids(select(known, since="2020-01-01")) == "abcd"
    assert time_of("1970-01-03T00:00+00:00") == 2 * 86400
    for text in ("30", "yesterday", "", "-2d", "2026-13-01"):
        with raises("usage.invalid-value", repr(text)):
            time_of(text)


@pytest.mark.parametrize(
    ("name", "reverse", "order"),
    [
        ("eval.acc", False, "abcd"),
        ("-eval.acc", False, "bacd"),  # runs without a value come last in both orders
        ("eval.acc", True, "bacd"),
        ("-eval.acc", True, "abcd"),
        ("state", False, "bdac"),
        ("started", True, "dcba"),
        (None, True, "dcba"),
        ("METRIC", False, "abcd"),
    ],
)
def test_runs_are_sorted_by_any_value(
    known: list[Entry], name: str | None, reverse: bool, order: str
) -> None:
    assert ids(select(known, sort=name, reverse=reverse)) == order


def test_the_newest_of_those_that_match(known: list[Entry]) -> None:
    assert ids(select(known, last=2)) == "cd"
    assert ids(select(known, last=9, where=["seed>0"])) == "ab"
    assert ids(select(known, last=1, where=["seed>0"], sort="seed")) == "b"


def test_from_python(runs: Path) -> None:
    found = found_by(runs, state="failed", where="seed=2", since="2d")
    assert [run.id for run in found] == ["b"]
    assert [run.id for run in found_by(runs, sort="-seed")][:2] == ["b", "a"]
    assert [run.id for run in found_by(runs)] == list("abcd")


def test_names_that_a_shell_completes(known: list[Entry]) -> None:
    names = fields.known(known)
    assert {"run", "metric", "exit_code", "args.lr", "train.steps", "eval.acc"} <= {*names}
