"""Map-style data sets before the first step: the same samples on all ranks, with dtrain's seeds."""

from __future__ import annotations

import io
import itertools
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from dtrain import Task
from dtrain.errors import BlamedError, DtrainError, format_error
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.data import sample_rng
from dtrain.train.loop.native import NativeTrainer
from support.errors import assert_named, assert_shown

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


PAGES = 4 * io.DEFAULT_BUFFER_SIZE
"""Bytes of a row in a file: more than are read ahead."""


class Rows(Dataset[Any]):
    """Rows of four numbers and a label, and what can be wrong with them."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.rank = int(os.environ["RANK"])
        self.made_in = os.getpid()
        self.parts = {"augment": [random.Random(7)]}
        self.own = np.random.default_rng(7)
        if how in ("one file", "reopened"):
            self.files = {"rows": open(Path(os.environ["ROWS"]), "rb")}  # noqa: SIM115
        if how == "fingerprint":
            self.fingerprint = "old" if self.rank == 0 else "new"

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        row = torch.full((4,), 0.5)
        row[3] = i / 64
        if self.how == "stale" and self.rank == 1:
            row[3] += 0.25
        if self.how == "noise":
            row += torch.rand(4) + random.random() + np.random.rand() + sample_rng().random()
        if self.how == "reseeded":
            self.own = np.random.default_rng(torch.initial_seed())
            row += self.own.random()
        if self.how == "private":
            row[0] += self.parts["augment"][0].random()
        if self.how == "entropy":
            row[0] += np.random.default_rng().random()
        if self.how == "often the same":
            row[0] += np.random.default_rng().random() < 0.5
        if self.how == "opened late" and os.getpid() == self.made_in:
            raise OSError("opened before the loader processes were forked")
        if self.how in ("one file", "reopened"):
            if self.how == "reopened" and os.getpid() != self.made_in:
                self.made_in = os.getpid()
                self.files["rows"].close()
                self.files["rows"] = open(Path(os.environ["ROWS"]), "rb")  # noqa: SIM115
            self.files["rows"].seek(i * PAGES)
            row[3] = self.files["rows"].read(PAGES)[-1]
        return row, i


class Listed(Rows):
    """Read several at once."""

    def __getitems__(self, ids: list[int]) -> list[Any]:
        return [self[i] for i in ids]


class Line(Task):
    def __init__(self, how: str) -> None:
        self.how = how

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def train_dataset(self) -> Any:
        if self.how == "several, stale":
            return Listed("stale")
        rows = Rows(self.how)
        return Subset(rows, range(40)) if self.how == "private" else rows

    def sample_order(self, seed: int, epoch: int) -> Any:
        if not self.how.startswith("order"):
            return None
        ids = np.arange(40)
        ids[3] = 17
        if "several" in self.how:
            ids[:10] = 17
        return ids[:20] if "short" in self.how else ids

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01)


Outcome = tuple[str | None, list[int], list[str]]
"""An error, whom it blames, warnings."""


def train(folder: Path, how: str, **data: Any) -> Outcome:
    torch.set_num_threads(1)
    job = JobSpec.model_validate(
        {
            "name": "t",
            "task": "t:T",
            "train": {"epochs": 1, "global_batch_size": 12},
            "data": data,
        }
    )
    run = RunDir(folder)
    run.create()
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dtrain").addHandler(handler)
    context = TrainContext(job, run, RankInfo.from_env(), 0, Line(how), torch.device("cpu"))
    try:
        NativeTrainer(context).run()
    except DtrainError as error:
        culprits = error.culprits if isinstance(error, BlamedError) else []
        return format_error(error), culprits, warned
    finally:
        logging.getLogger("dtrain").removeHandler(handler)
    return None, [], warned


def each(folder: Path, calls: list[dict[str, Any]]) -> list[Outcome]:
    return [train(folder / str(index), **call) for index, call in enumerate(calls)]


def many(world_size: int, folder: Path, *calls: dict[str, Any]) -> list[list[Outcome]]:
    """For each call, the outcomes of all ranks, from one start of ranks."""
    return list(zip(*run_ranks(each, world_size, folder, list(calls)), strict=True))  # type: ignore[arg-type]


CODE = "data.not-same-on-ranks"


def test_a_rank_that_reads_another_file_is_named(tmp_path: Path) -> None:
    stale, loaders, several, fingerprint = many(
        3,
        tmp_path,
        {"how": "stale"},
        {"how": "stale", "workers": 2},
        {"how": "several, stale"},
        {"how": "fingerprint"},
    )
    for outcomes in (stale, loaders, several):
        ((error, culprits),) = {(error, tuple(blamed)) for error, blamed, _ in outcomes}
        assert culprits == (1,)
        assert error is not None
        assert_shown(error, CODE, "train_dataset() ")
        sample = re.search(r"rank 1: sample (\d+), element \[0\]\[3\] ", error)
        assert sample is not None, error
        right = int(sample[1]) / 64
        assert_named(error, [f" {right + 0.25:g} ", f" {right:g} on rank 0"])
    ((error, culprits),) = {(error, tuple(blamed)) for error, blamed, _ in fingerprint}
    assert culprits == (0,)
    assert_shown(str(error), CODE, "train_dataset() ", "rank 0: fingerprint ", "new on rank 1")
    (two,) = many(2, tmp_path / "two", {"how": "stale"})
    assert [blamed for _, blamed, _ in two] == [[], []]
    names = ("train_dataset() ", "ranks 0 and 1: sample", "on rank 1 and")
    assert_shown(str(two[0][0]), CODE, *names)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(i for i in range(40) for _ in range(PAGES)))
    monkeypatch.setenv("ROWS", str(path))
    return path


def test_a_file_that_loader_processes_share_is_named(tmp_path: Path, rows: Path) -> None:
    """Where one seeks, another reads: each gets rows of the other, now and then."""
    (outcomes,) = many(2, tmp_path, {"how": "one file", "workers": 2})
    for error, culprits, _ in outcomes:
        assert_shown(str(error), "data.file-position-shared", str(rows), "files['rows']")
        assert culprits == [0, 1]


def test_sound_data_sets_are_left_in_peace(tmp_path: Path, rows: Path) -> None:
    """Keyed augmentation, generators that are seeded anew, files opened in loader processes, or by
    one process alone."""
    assert rows.exists()
    calls = [
        {"how": how, "workers": workers}
        for how, workers in [
            *itertools.product(("right", "noise", "reseeded", "one file"), (0, 2)),
            ("opened late", 2), ("reopened", 2),
        ]
        if (how, workers) != ("one file", 2)
    ]  # fmt: skip
    outcomes = run_ranks(each, 2, tmp_path, calls)
    assert outcomes == [[(None, [], [])] * len(calls)] * 2


def test_generators_of_its_own_are_a_warning(tmp_path: Path) -> None:
    """And no rank is blamed for what they give."""
    calls = [{"how": how, "workers": n} for how in ("private", "entropy") for n in (0, 2)]
    calls += [{"how": "often the same"}] * 4
    outcomes = many(3, tmp_path, *calls)
    for index, ((first, *others), call) in enumerate(zip(outcomes, calls, strict=True)):
        assert first[0] is None, call
        assert [other[2] for other in others] == [[], []]
        if index < 4:
            (warning,) = first[2]
            assert_named(warning, ["sample_rng()", "sample_seed()"])
            assert ("(dataset.parts['augment'][0])" in warning) == (call["how"] == "private")
    (alone,) = run_ranks(train, 1, tmp_path / "alone", "private")
    assert alone[0] is None
    assert "dataset.parts['augment'][0]" in alone[2][0]


def test_an_order_with_an_id_twice_is_a_warning(tmp_path: Path) -> None:
    calls = [{"how": how} for how in ("order", "order, several", "order, short")]
    once, several, short = many(2, tmp_path, *calls)
    assert [outcome[0] for outcome in (*once, *several, *short)] == [None] * 6
    assert once[0][2] == ["sample_order(): 1 id comes twice (17), 1 never (3)"]
    assert several[0][2] == [
        "sample_order(): 1 id comes more than once (17), 10 never (0, 1, 2, 3 and 6 more)"
    ]
    assert short[0][2] == []
    assert [outcomes[1][2] for outcomes in (once, several)] == [[], []]


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    outcomes = run_ranks(train, 2, tmp_path, "stale", exactly_once=False)
    assert outcomes == [(None, [], [])] * 2
