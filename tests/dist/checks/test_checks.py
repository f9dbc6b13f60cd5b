"""The ledger on real trainings: every kind of fault is found, and who, where and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from dtrain import Callback
from dtrain.callback import Session
from dtrain.integrations.lightning.trainer import LightningTrainer
from dtrain.job.faults import KINDS, TENSOR_KINDS
from dtrain.testing import run_ranks
from support import ROOT
from support.errors import assert_named
from support.faults import DATA, NAN, STEP, STRATEGIES, Case, Outcome, found, kinds_of, outcomes
from support.trainings import Regression, job, train

IN_TENSORS = {kind: kind.split("-")[1] for kind in TENSOR_KINDS}
EXPECTED = {
    "lr": r"learning rate and counters: lr is 0\.010\d+ on rank {c} and 0\.009\d+",
    "seed": r"the seed is \d on rank \d and \d on rank \d",
    "nan-loss": r"the loss of step 5 is nan: on rank {c}, micro-batch 1 of \d+, samples \d+",
    "nan-gradient": r"nearest to the loss is first\.weight: from first\.weight of rank {c}, micro",
    "duplicate-sample": r"rank {c}, step 5: read sample \d+ instead of sample \d+ \(position \d+\)",
    "drop-sample": r"rank {c}, step 5: did not read sample \d+ \(position \d+\)",
    "swap-collectives": r"collectives: number \d+ is all_reduce\(float32\[\]\) at "
    r"support/faults\.py:",
}
ELEMENT = {"flip": "1 of 96", "scale": "of 96", "swap": "2 of 96"}


def faults(strategy: str, world_size: int, every: int) -> list[Case]:
    """Every kind that the interval can show, on the first rank and on the last."""
    kinds = kinds_of(strategy)
    held = strategy in ("fsdp", "dp")
    kinds = [kind for kind in kinds if not (held and IN_TENSORS.get(kind) == "gradient")]
    if every > 1:  # what is compared with itself is watched after each comparison only
        kinds = [
            k for k in kinds if IN_TENSORS.get(k) != "buffer" and not (held and k in IN_TENSORS)
        ]
    culprits = [0] if strategy == "dp" else [0, world_size - 1]
    return [Case(strategy, kind, culprit, every) for kind in kinds for culprit in culprits]


def after(case: Case) -> int:
    """The step whose check shows a fault of step 5."""
    first = STEP if IN_TENSORS.get(case.kind, "gradient") == "gradient" else STEP + 1
    return -(-first // case.every) * case.every


def check(case: Case, ranks: list[Outcome]) -> None:
    """Every rank has ended, the right one is blamed, and the right place named."""
    assert all(each.error for each in ranks), (case, ranks)
    mine, blamed = ranks[case.culprit], [not each.collateral for each in ranks]
    alone = [rank == case.culprit for rank in range(len(ranks))]
    if case.kind in NAN:
        unknown = case.kind == "nan-gradient" and case.strategy == "fsdp"
        assert unknown or blamed == alone, (case, ranks)
        assert unknown or re.search(EXPECTED[case.kind].format(c=case.culprit), mine.text), mine
        return
    compared = case.kind not in DATA and "holds other bits" not in mine.text
    undecided = compared and len(ranks) == 2
    assert blamed == ([True, True] if undecided else alone), (case, ranks)
    if undecided and case.kind != "seed":
        assert "no majority" in mine.text, (case, mine)
    if case.kind in TENSOR_KINDS:
        check_tensor(case, mine)
    else:
        pattern = EXPECTED[case.kind].format(c=r"\d" if undecided else case.culprit)
        if case.kind != "lr" or not undecided:
            assert re.search(pattern, mine.text), (case, mine)


def check_tensor(case: Case, mine: Outcome) -> None:
    assert f"after step {after(case)}" in mine.text, (case, mine)
    target = IN_TENSORS[case.kind]
    if target == "buffer" or case.strategy in ("fsdp", "dp"):
        kind = {"buffer": "buffers", "moment": "optimizer state", "parameter": "parameters"}[target]
        name = "norm.running_mean" if target == "buffer" else "first.weight"
        assert f"rank {case.culprit} holds other bits than" in mine.text, (case, mine)
        assert f"{kind}: {name}" in mine.text, (case, mine)
        return
    action = case.kind.split("-")[0]
    place = r"first\.weight\[\d+, \d\]" if action == "scale" else r"first\.weight\[1, \d\]"
    assert re.search(rf"parameters: {place} is .*{ELEMENT[action]} elements", mine.text), mine


@pytest.mark.parametrize(
    ("strategy", "world_size", "every"), [("ddp", 3, 3), ("exact", 2, 1), ("fsdp", 2, 1)]
)
def test_every_fault_is_found(tmp_path: Path, strategy: str, world_size: int, every: int) -> None:
    cases = faults(strategy, world_size, every)
    for case, ranks in zip(cases, outcomes(cases, world_size, tmp_path), strict=True):
        check(case, ranks)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_document_shows_what_is_caught(tmp_path: Path, strategy: str) -> None:
    """Its table has what comes of a fault on the last of three ranks, also where it is not seen."""
    world_size = 1 if strategy == "dp" else 3  # whose replicas are of one process
    checked = faults(strategy, world_size, 1)
    assert len(checked) > 10
    shown = {kind: Case(strategy, kind, world_size - 1, 1) for kind in kinds_of(strategy)}
    cases = list(dict.fromkeys([*checked, *shown.values()]))
    came = dict(zip(cases, outcomes(cases, world_size, tmp_path), strict=True))
    for case in checked:
        check(case, came[case])
    assert documented(strategy) == {kind: found(case, came[case]) for kind, case in shown.items()}


def documented(strategy: str) -> dict[str, str]:
    """The column of a strategy in the table of docs/checks.md: kind of fault → what is found."""
    lines = (ROOT / "docs" / "checks.md").read_text().splitlines()
    rows = {each: line for each in KINDS for line in lines if line.startswith(f"| `{each}`: ")}
    assert all(row.startswith(f"| `{kind}`: {KINDS[kind]} | ") for kind, row in rows.items())
    (header,) = [line for line in lines if line.startswith("| fault | ")]
    column = header.split("|").index(f" `{strategy}` ")
    cells = {kind: row.split("|")[column].strip() for kind, row in rows.items()}
    return {kind: cell for kind, cell in cells.items() if cell != "-"}


def test_a_fault_as_it_is_by_default_stays_until_the_default_comparison(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind.startswith("flip-") and "buffer" not in kind]
    cases = [Case("ddp", kind, 1, 50, steps=60, place="") for kind in kinds]
    for ranks in outcomes(cases, 3, tmp_path):
        assert_named(ranks[1].text, ["after step 0 ", "after step 50:"])
        assert [each.collateral for each in ranks] == [True, False, True], ranks
        assert re.search(r"parameters: first\.weight\[\d+, \d\] is", ranks[1].text), ranks


@torch.no_grad()
def change(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Clamp parameters, and average into a moment and a buffer."""
    for each in model.parameters():
        each.clamp_(-0.2, 0.2)
        optimizer.state[each]["momentum_buffer"].mul_(0.9)
    model.norm.running_mean.mul_(0.5)


class Changing(Callback):
    """Changes what is trained after each step."""

    def on_step(self, session: Session, loss: float) -> None:
        change(session.model, session.optimizer)


class ChangingHooks(pl.Callback):
    """Does so in hooks that Lightning calls between two steps of dtrain's."""

    def __init__(self, task: Averaged) -> None:
        self.task = task

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        change(pl_module.model, self.task.made)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step:
            change(pl_module.model, self.task.made)


class Averaged(Regression):
    """A training whose model changes between steps too."""

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        self.made = super().optimizer(model)
        return self.made

    def callbacks(self) -> list[Any]:
        return [ChangingHooks(self) if self.net[0] else Changing()]


def hooked(folder: Path) -> None:
    """Train with Lightning's hooks, with all checks after each step."""
    for strategy in ("ddp", "fsdp"):
        args = {"norm": True, "dropout": 0.1, "n": 48}
        spec = job(strategy, args, checks={"every_steps": 1})
        train(spec, folder / strategy, kind=Averaged, trainer_class=LightningTrainer)


def test_what_hooks_of_lightning_change_is_no_fault(tmp_path: Path) -> None:
    run_ranks(hooked, 2, tmp_path)


def averaged(strategies: list[str], folder: Path) -> list[dict[str, Any]]:
    """The parameters under each strategy, with all checks after each step."""
    sizes = {"global_batch_size": 8, "virtual_shards": 2, "steps": 5}
    args = {"dtype": "float64", "norm": True}
    specs = [job(strategy, args, train=sizes, checks={"every_steps": 1}) for strategy in strategies]
    return [train(each, folder / each.strategy, 2, Averaged).parameters for each in specs]


def test_what_callbacks_change_is_no_fault(tmp_path: Path) -> None:
    strategies = ["exact", "ddp", "fsdp"]  # `exact` alone normalises over the whole batch
    _, one, *others = run_ranks(averaged, 2, strategies, tmp_path)[0]
    others += run_ranks(averaged, 1, ["dp"], tmp_path)[0]
    for other in others:
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-10, err_msg=name)
