"""Saved by some ranks, loaded by others: every parameter and every moment is the same."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Callback
from dtrain.callback import Session
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.blocks import BLOCK, BlockFile
from dtrain.train.checkpoint.content import read
from dtrain.train.checkpoint.files import PROGRESS, STATE, OpenCheckpoint, part_name
from dtrain.train.checkpoint.state import model_state, optimizer_state
from dtrain.train.checkpoint.store import Loaded
from dtrain.train.loop.native import NativeTrainer
from support.sharded import Sharded
from support.trainings import Outcome, Regression, job, losses, train

ARGS = {"optimizer": "adamw", "width": 13, "norm": True, "n": 48}
"""13 rows are cut unevenly by 2, 3 and 4, and one row is on one rank."""
TRAIN = {"steps": 5, "global_batch_size": 24}
SAVED = 3
"""The step whose checkpoint is loaded."""

Values = dict[str, Any]


def whole(value: Any) -> Any:
    """Return a tensor with all its parts, as an array. All ranks call it."""
    if not isinstance(value, torch.Tensor):
        return value
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().numpy().copy()


def values_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Return what a checkpoint has of a model and an optimizer, by name. All ranks call it."""
    found = {name: whole(each) for name, each in sorted(model_state(model).items())}
    state = optimizer_state(model, optimizer)
    for name, values in sorted(state["state"].items()):
        found |= {f"{name} {key}": whole(each) for key, each in values.items()}
    for group in state["groups"]:
        options = {**group, "params": None}
        found |= {f"group of {name}": options for name in group["params"]}
    return found


def assert_same(one: Values, other: Values) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        if hasattr(value, "tobytes"):
            assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
            assert value.tobytes() == other[name].tobytes(), name
        else:
            assert value == other[name], name


class Watching(Callback):
    """Keeps the values after the step that is saved, and those that were loaded."""

    seen: dict[str, Values] = {}

    def on_start(self, session: Session) -> None:
        self._keep(f"loaded {session.step}", session)

    def on_step(self, session: Session, loss: float) -> None:
        self._keep(f"step {session.step}", session)

    def _keep(self, when: str, session: Session) -> None:
        self.seen[when] = values_of(session.model, session.optimizer)


class Watched(Regression):
    def callbacks(self) -> list[Any]:
        return [Watching()]


class TwoAlike(nn.Module):
    """Two layers of one shape, in one order or the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 13)
        for name in names:
            self.add_module(name, nn.Linear(13, 13))
        self.last = nn.Linear(13, 1)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.b(torch.tanh(self.a(self.first(x))))))
        return found


class Ordered(Watched):
    names = ["a", "b"]

    def model(self) -> nn.Module:
        return TwoAlike(self.names)


class Reordered(Ordered):
    names = ["b", "a"]


Seen = dict[str, Values]
"""The values by when they were seen: `step 3`, or `loaded 3`."""


def watched(*args: Any, **kwargs: Any) -> tuple[Outcome, Seen]:
    """Train as a rank, and return what it has seen too."""
    Watching.seen.clear()
    return train(*args, **kwargs), dict(Watching.seen)


@dataclass(frozen=True)
class Way:
    """How a training runs."""

    strategy: str
    ranks: int
    trainer: type[NativeTrainer] = NativeTrainer

    def run(self, folder: Path, kind: type[Regression] = Watched) -> list[tuple[Outcome, Seen]]:
        section = TRAIN | ({"virtual_shards": 12} if self.strategy == "exact" else {})
        spec = job(self.strategy, ARGS, train=section, checkpoint={"every_steps": SAVED})
        call = functools.partial(watched, kind=kind, trainer_class=self.trainer)
        return run_ranks(call, self.ranks, spec, folder)

    def __str__(self) -> str:
        name = f"{self.strategy} of {self.ranks}"
        return name if self.trainer is NativeTrainer else f"{name}, lightning"


def to_resume(folder: Path, other: Path) -> Path:
    """Return a run that has the checkpoint of step 3 of another as its newest."""
    name = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(folder / name, other / name)
    return other


Saved = Callable[[Way], tuple[Path, list[tuple[Outcome, Seen]]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return an unbroken training of a kind, which is trained once, and its directory."""

    @functools.cache
    def once(way: Way) -> tuple[Path, list[tuple[Outcome, Seen]]]:
        folder = tmp_path_factory.mktemp("saved")
        return folder, way.run(folder)

    return once


WAYS = [("single", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 3), ("fsdp", 4), ("exact", 2)]
BY_LIGHTNING = [("single", 1), ("ddp", 2), ("fsdp", 2)]


@pytest.mark.parametrize(
    "way",
    [*(Way(*way) for way in WAYS), *(Way(*way, LightningTrainer) for way in BY_LIGHTNING)],
    ids=str,
)
def test_what_is_loaded_is_what_was_saved_and_goes_on(
    way: Way, saved: Saved, tmp_path: Path
) -> None:
    folder, unbroken = saved(way)
    resumed = way.run(to_resume(folder, tmp_path))
    for (_, before), (_, after) in zip(unbroken, resumed, strict=True):
        assert list(after) == ["loaded 3", "step 4", "step 5"]
        assert_same(after["loaded 3"], before["step 3"])
        assert_same(after["step 4"], before["step 4"])
        assert_same(after["step 5"], before["step 5"])
    assert losses(tmp_path) == losses(folder)[SAVED:]


_N, _L = NativeTrainer, LightningTrainer
PAIRS = [
    (Way("single", 1, _N), Way("ddp", 2, _L)), (Way("single", 1, _L), Way("fsdp", 3, _N)),
    (Way("single", 1, _N), Way("exact", 4, _N)), (Way("ddp", 3, _N), Way("single", 1, _L)),
    (Way("fsdp", 4, _L), Way("single", 1, _N)), (Way("exact", 2, _N), Way("single", 1, _N)),
    (Way("ddp", 2, _L), Way("fsdp", 3, _L)), (Way("fsdp", 2, _N), Way("ddp", 4, _N)),
    (Way("ddp", 3, _N), Way("exact", 2, _L)), (Way("exact", 3, _L), Way("fsdp", 4, _N)),
    (Way("fsdp", 4, _N), Way("exact", 3, _N)), (Way("exact", 4, _N), Way("ddp", 2, _L)),
    (Way("fsdp", 4, _N), Way("fsdp", 2, _N)), (Way("fsdp", 2, _N), Way("fsdp", 3, _L)),
]  # fmt: skip
"""Every two numbers of ranks in both orders, and every two strategies likewise."""


def test_the_pairs_are_all_there() -> None:
    strategies = {each for each, _ in WAYS}
    pairs = PAIRS + [(Way(*way), Way(*way)) for way in WAYS]
    ranks = {(one.ranks, other.ranks) for one, other in pairs}
    assert ranks == set(itertools.product(range(1, 5), repeat=2))
    ways = {(one.strategy, other.strategy) for one, other in pairs}
    assert ways == set(itertools.product(strategies, repeat=2))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_what_is_loaded_by_others_is_what_was_saved(
    one: Way, other: Way, saved: Saved, tmp_path: Path
) -> None:
    folder, unbroken = saved(one)
    for _, seen in other.run(to_resume(folder, tmp_path)):
        assert list(seen) == ["loaded 3", "step 4", "step 5"]
        assert_same(seen["loaded 3"], unbroken[0][1]["step 3"])


@pytest.mark.parametrize(
    "way", [Way("ddp", 2), Way("fsdp", 2), Way("fsdp", 3, LightningTrainer)], ids=str
)
def test_moments_follow_the_names_of_their_parameters(way: Way, tmp_path: Path) -> None:
    unbroken = way.run(tmp_path / "saved", Ordered)
    resumed = way.run(to_resume(tmp_path / "saved", tmp_path / "other"), Reordered)
    for (_, before), (_, after) in zip(unbroken, resumed, strict=True):
        moments = [after["loaded 3"][f"{name}.weight exp_avg"] for name in "ab"]
        assert (moments[0] != moments[1]).any()
        assert_same(after["loaded 3"], before["step 3"])


# -- bytes -------------------------------------------------------------------------------------


def save(folder: Path, layers: int, width: int) -> Path:
    model = Sharded(layers, width, seed=1)
    model.step()
    return model.save(folder)


def sizes(folder: Path, world_size: int) -> list[int]:
    return [(folder / part_name(rank)).stat().st_size for rank in range(world_size)]


def test_each_rank_writes_its_share(tmp_path: Path) -> None:
    (folder, *_) = run_ranks(save, 4, tmp_path / "fsdp", 4, 256)
    found = sizes(folder, 4)
    values = 3 * 4 * (256 * 256 + 256) * 4
    assert values < sum(found) < 1.03 * values
    assert max(found) < 1.02 * values / 4

    args = {"optimizer": "adamw", "width": 60_000}  # one tensor of 1.4 MB is cut
    run_ranks(train, 2, job("ddp", args, train={"steps": 1}), tmp_path / "ddp")
    found = sizes(tmp_path / "ddp" / "checkpoints" / "step-00000001", 2)
    values = 3 * (6 + 1 + 1) * 60_000 * 4
    assert values < sum(found) < 1.02 * values
    assert max(found) < 1.1 * values / 2


class Counting:
    """Counts the bytes of files that are read while it is in use."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> Counting:
        self._patch = pytest.MonkeyPatch()
        plain = BlockFile._read_block

        def counted(file: BlockFile, index: int, memory: Any) -> memoryview:
            data = plain(file, index, memory)
            self.bytes[file.name] += len(data)
            return data

        self._patch.setattr(BlockFile, "_read_block", counted)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def read_by_each(folder: Path, layers: int, width: int) -> Counter[str]:
    """Load a checkpoint without the pass that verifies it; the bytes that this rank reads."""
    model = Sharded(layers, width, seed=2)
    with OpenCheckpoint(folder) as opened, Counting() as counting:
        state, progress = read(opened)
        model.apply(Loaded(folder, state, progress))
    return counting.bytes


def test_no_rank_reads_more_than_it_needs(tmp_path: Path) -> None:
    folder = run_ranks(save, 2, tmp_path, 8, 1024)[0]
    found = sizes(folder, 2)
    assert min(found) > 10 * BLOCK  # more than are cached
    for rank, counts in enumerate(run_ranks(read_by_each, 2, folder, 8, 1024)):
        assert counts[part_name(rank)] <= found[rank] + 2 * BLOCK
        # once for the header, and once for the numbers that all ranks need
        assert counts[part_name(1 - rank)] <= 2 * BLOCK
        others = {name: counts[name] for name in counts if name not in map(part_name, range(2))}
        assert others == {name: (folder / name).stat().st_size for name in (STATE, PROGRESS)}
