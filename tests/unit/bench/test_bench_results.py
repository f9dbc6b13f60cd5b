"""How the results of `dtrain bench` are judged."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.bench.results import (
    Bench,
    Collective,
    Link,
    LoaderRate,
    Measured,
    Step,
    Store,
    advice,
    bus_factor,
    read_step,
    slow_links,
)
from dtrain.bench.session import PARTS, chosen
from dtrain.bench.text import shown
from dtrain.run import files
from dtrain.run.phases import PHASES, Phase
from dtrain.run.rundir import RunDir
from dtrain.train.bench import rounds
from support.errors import raises


@pytest.mark.parametrize(
    ("operation", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("broadcast", 1.0)],
)
def test_the_bus_bandwidth_of_nccl_tests(operation: str, factor: float) -> None:
    assert bus_factor(operation, 4) == factor
    each = Collective(operation, 1000, 0.01)
    assert each.bytes_per_s == pytest.approx(1e5)
    assert each.bus_bytes_per_s(4) == pytest.approx(1e5 * factor)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_each_pair_meets_once_and_no_node_is_in_two_pairs(count: int) -> None:
    made = list(rounds(count))
    pairs = [tuple(sorted(pair)) for each in made for pair in each]
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))
    for each in made:
        members = [node for pair in each for node in pair]
        assert len(members) == len(set(members))


def links(nodes: int, **rates: float) -> list[Link]:
    """All links at 10 GB/s, but those that are named like `l0_1`."""
    pairs = itertools.permutations(range(nodes), 2)
    return [Link(a, b, 1e-5, rates.get(f"l{a}_{b}", 10e9)) for a, b in pairs]


def test_the_slow_link() -> None:
    found = slow_links(links(4, l1_3=4e9, l3_1=6e9, l0_2=2e9))
    assert [(link.source, link.target, part) for link, part in found] == [
        (0, 2, pytest.approx(0.2)),
        (1, 3, pytest.approx(0.4)),
    ]
    assert not slow_links(links(4))
    assert not slow_links(links(2, l0_1=1e9)), "two links have no usual rate"


def measured(loader: dict[int, float] | None = None, slow: float = 10e9) -> Measured:
    return Measured(
        nodes=["n0", "n1", "n2"],
        ranks=6,
        device="cpu",
        copy_bytes_per_s=5e9,
        collectives=[Collective("all_reduce", 1 << 24, 0.02)],
        links=links(3, l2_0=slow),
        store=Store(1e-4, 2e-4),
        loader=[LoaderRate(*each) for each in (loader or {}).items()],
    )


def step(straggler: tuple[int, float] | None = None, **shares: float) -> Step:
    rest = 1 - sum(shares.values())
    whole: dict[Phase, float] = {name: shares.get(name, 0.0) for name in PHASES}
    return Step(100, 10.0, {**whole, "forward": rest}, straggler)


@pytest.mark.parametrize(
    ("bench", "said"),
    [
        (Bench([]), []),
        (Bench([], measured()), []),
        (Bench([], measured(slow=2e9)), ["n2 to n0 is 80% below"]),
        (Bench([], measured({0: 100, 1: 105, 2: 125}), workers=0), []),
        (Bench([], measured({0: 100, 1: 105, 2: 185, 4: 200}), workers=0), ["data.workers=2"]),
        (Bench([], measured({0: 100, 2: 200}), workers=2), []),
        (Bench([], measured({0: 100, 2: 200}), step(data=0.05), 0), []),
        (Bench([], measured({0: 100, 2: 200}), step(data=0.4), 0), ["40% .*data.workers=2"]),
        (Bench([], measured({0: 100, 2: 90}), step(data=0.4), 0), ["40% .* no number of workers"]),
        (Bench([], None, step(data=0.4)), ["40% .*faster disk"]),
        (Bench([], None, step(reduction=0.2)), []),
        (Bench([], None, step(reduction=0.4)), ["40% .* reduction"]),
        (Bench([], None, step((3, 1.5), reduction=0.4)), ["rank 3 takes 1.5 times"]),
        (Bench([], None, step(other=0.3)), ["30% .*callbacks"]),
        (Bench([], None, Step(8, 9.0, {"data": 1.0})), ["too few"]),
        (Bench([], None, Step(90, 1.0, {"data": 1.0})), ["too few"]),
    ],
)
def test_advice_follows_from_what_was_measured(bench: Bench, said: list[str]) -> None:
    import re

    found = advice(bench)
    assert len(found) == len(said), found
    for line, pattern in zip(found, said, strict=True):
        assert re.search(pattern, line), line


def test_the_first_second_of_a_run_does_not_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_step(run) is None
    run.node(0, 0).mkdir(parents=True)

    def note(rank: int, step: int, steps: int, **phases: float) -> None:
        line = {"time": 1.0, "restart": 0, "step": step, "steps": steps, "phases": phases}
        files.append_line(run.phases(0, 0, rank), line)

    note(0, 5, 5, data=9.0)
    note(1, 5, 5, data=9.0)
    first = read_step(run)
    assert first is not None
    assert (first.steps, first.seconds) == (5, pytest.approx(9.0)), "there is nothing else"
    note(0, 15, 10, data=1.0, forward=3.0, evaluation=50.0)
    note(0, 25, 10, data=1.0, forward=3.0)
    note(1, 25, 20, data=6.0, forward=2.0)
    found = read_step(run)
    assert found is not None
    assert (found.steps, found.seconds) == (20, pytest.approx(8.0))
    assert found.shares["data"] == pytest.approx(0.5)
    assert found.shares["forward"] == pytest.approx(0.5)
    assert "evaluation" not in found.shares


@pytest.mark.parametrize("nodes", [3, 12])
def test_tables_fit_80_columns(nodes: int) -> None:
    names = [f"node-{number:04}" for number in range(nodes)]
    many = Measured(
        names, 8 * nodes, "cpu", 5e9, [Collective("reduce_scatter", 1 << 28, 12.5)],
        links(nodes, l1_0=1e9), Store(1e-4, 2e-4), [LoaderRate(0, 123456.0), LoaderRate(2, 1e6)],
    )  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=80)
    for each in shown(Bench(["bench-abc"], many, step(data=0.4), 0, {"x": "why"})):
        console.print(each)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for part in ("reduce_scatter", "node-0001", "data.workers=2", "90% below", "x: not measured"):
        assert part in text.replace("\n", " "), part
    assert "…" not in text


def test_the_parts_that_are_asked_for() -> None:
    assert chosen([]) == list(PARTS)
    assert chosen(["store, links", "collectives"]) == ["collectives", "links", "store"]
    with raises("usage.invalid-value", "link"):
        chosen(["link"])
