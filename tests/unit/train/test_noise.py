"""Random numbers of `loss` that belong to samples, and what a task keeps in attributes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dtrain import Task
from dtrain.train.tracing import digest
from dtrain.train.tracing.attributes import Attributes
from dtrain.train.tracing.noise import Draws, FixedNoise


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

DRAWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "like": torch.randn_like,
    "shape": lambda x: torch.rand(len(x), 2),
    "in place": lambda x: torch.empty_like(x).uniform_().exponential_(),
    "a range": lambda x: torch.randint(2, 9, (len(x),)),
    "dropout": lambda x: functional.dropout(x, 0.5),
    "by weight": lambda x: torch.multinomial(x.exp(), 1),
    "parts of samples": lambda x: torch.randn(len(x) * 4, 2).view(len(x), -1),
    "one for all": lambda x: torch.randn(()) * x,
    "Python": lambda x: random.random() * x,
    "NumPy": lambda x: np.random.rand() * x,
    "twice": lambda x: torch.randn_like(x) - torch.randn_like(x),
}


def in_parts(
    draw: Callable[[torch.Tensor], torch.Tensor], *sizes: int, noise: FixedNoise
) -> torch.Tensor:
    made = []
    for part in X.split(sizes):
        with noise:
            noise.begin({"x": part})
            made.append(draw(part))
    return torch.cat(made)


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_sample_draws_the_same_in_any_batch(draw: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(3)
    whole = in_parts(draw, 6, noise=FixedNoise(by_sample=False))
    torch.manual_seed(4)
    parts = in_parts(draw, 1, 3, 2, noise=FixedNoise(by_sample=False))
    assert torch.equal(whole, parts)
    assert len(torch.unique(whole)) > 1, "samples draw for themselves"


def test_alone_a_sample_also_decides_what_other_generators_draw() -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.random.randn(*x.shape)) * random.random()

    one = in_parts(draw, 1, 1, 1, 1, 1, 1, noise=FixedNoise(by_sample=True))
    noise = FixedNoise(by_sample=True)
    with noise:
        noise.begin(X[4:5])
        assert torch.equal(draw(X[4:5]), one[4:5])
    assert len(torch.unique(one)) == one.numel()


def test_what_backward_computes_again_draws_the_same_after_another_call() -> None:
    noise, seen = FixedNoise(by_sample=False), []

    def noisy(x: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn_like(x)
        seen.append(drawn)
        return (x * drawn).square()

    with noise:
        totals = []
        for part in X.split(3):
            noise.begin(part)
            totals.append(checkpoint(noisy, part.requires_grad_(), use_reentrant=False).sum())
        sum(totals).backward()
    assert len(seen) == 4
    assert {digest.of_tensors([each]) for each in seen[:2]} == {
        digest.of_tensors([each]) for each in seen[2:]
    }


def test_lines_that_draw_are_told() -> None:
    def loss() -> None:
        torch.randn_like(X)
        random.random()
        np.random.rand()

    noise, draws = FixedNoise(by_sample=False), Draws()
    with noise:
        noise.begin(X)  # which seeds
        with draws.watching():
            loss()
    first, name = loss.__code__.co_firstlineno, "test_noise.py"
    assert noise.places == {f"randn_like at {name}:{first + 1}"}
    assert draws.places == {f"random at {name}:{first + 2}", f"numpy.random at {name}:{first + 3}"}


class Held(Task):
    """Keeps things."""

    def __init__(self) -> None:
        self.count, self.mean = 0, torch.zeros(2)
        self.seen: list[Any] = []
        self.rng = torch.Generator().manual_seed(1)
        self.net = torch.nn.Linear(2, 1)
        self.data = torch.utils.data.TensorDataset(torch.zeros(3))


def digests(task: Held) -> dict[str, str]:
    return Attributes(task, ()).digests(None)


def test_attributes_that_change_are_seen_and_can_be_put_back() -> None:
    task = Held()
    attributes = Attributes(task, ("count", "rng"))
    attributes.keep()
    before = attributes.digests(task.net)
    assert set(before) == {"count", "mean", "seen", "rng"}
    assert before["rng"].startswith("Generator ")
    task.count += 1
    task.mean += 1
    task.seen.append(3)
    torch.rand(2, generator=task.rng)
    after = attributes.digests(task.net)
    assert {name for name in before if before[name] != after[name]} == set(before)
    attributes.put_back()
    restored = attributes.digests(task.net)
    assert {name for name in before if before[name] != restored[name]} == {"mean", "seen"}


class Linked:
    """Leads to all others, as a trainer and its callbacks do."""

    def __init__(self, others: list[Linked]) -> None:
        self.others, self.count = others, 0


def test_objects_that_lead_to_one_another_are_opened_once() -> None:
    others: list[Linked] = []
    others += [Linked(others) for _ in range(50)]
    task = Held()
    task.seen = [others[0]]
    before = digests(task)["seen"]
    others[0].count += 1
    assert digests(task)["seen"] != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0), ("1", 1), ([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), ({1, 2}, {1, 3}),
        (np.zeros(2), np.zeros((2, 1))), (random.Random(1), random.Random(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)), (None, 0),
        (np.random.default_rng(1), np.random.default_rng(2)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_have_digests_of_what_they_hold(one: Any, other: Any) -> None:
    held, task = Held(), Held()
    held.seen, task.seen = [one], [other]
    assert digests(held)["seen"] != digests(task)["seen"]
    task.seen = [one]
    assert digests(held)["seen"] == digests(task)["seen"]
