"""predictions.npz: row i is sample i of the evaluation data, on any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain import Task
from dtrain.testing import run_ranks
from dtrain.train.loop.predictions import Predictions, predicts
from support.errors import raises
from support.trainings import Outcome, Regression, job, lines, train


class Predicting(Regression):
    """Predicts in many shapes and types; `bad`: what is wrong, and for which samples."""

    def __init__(self, bad: str = "", **args: Any) -> None:
        super().__init__(**args)
        self.bad = bad

    def predict(self, model: nn.Module, batch: Any) -> Any:
        assert not model.training
        assert not torch.is_grad_enabled()
        out, late = model.predict(batch["x"]), int(batch["i"][0]) >= 4
        if self.bad == "plain":
            return batch["i"]
        if self.bad == "reduced":
            return out.mean()
        if self.bad == "short" and late:
            return out[1:]
        if self.bad == "list":
            return {"out": out.tolist()}
        named = {"out": out, "label": (out > 0).long().squeeze(1), "i": batch["i"]}
        if self.bad == "ragged" and late:
            named["out"] = out.expand(-1, 2)
        if self.bad == "unnamed" and late:
            del named["label"]
        return {**named, "half": out.bfloat16(), "none": out[:, :0]}


def rows(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    assert not (folder / ".predictions").exists()
    with np.load(folder / "predictions.npz") as arrays:
        return dict(arrays)


def run(world_size: int, folder: Path, args: dict[str, Any], **sections: Any) -> list[Outcome]:
    sections = {"train": {"steps": 4}, "eval": {"batch_size": 2}, **sections}
    return run_ranks(train, world_size, job("ddp", args, **sections), folder, kind=Predicting)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("n", "workers"), [(1, 0), (3, 0), (11, 2)])
def test_rows_are_those_of_one_process(
    n: int, workers: int, world_size: int, rank: int, tmp_path: Path
) -> None:
    sections = {"train": {"steps": 4}, "eval": {"batch_size": 2}, "data": {"workers": workers}}
    args = {"held_out": n}
    train(job("ddp", args, **sections), tmp_path / "ranks", kind=Predicting)
    if rank == 0:
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr("dtrain.train.collectives.in_group", lambda: False)
            train(job("single", args, **sections), tmp_path / "single", kind=Predicting)
        ours, theirs = rows(tmp_path / "ranks"), rows(tmp_path / "single")
        assert list(ours) == list(theirs) == ["half", "i", "label", "none", "out"]
        np.testing.assert_array_equal(ours["i"], np.arange(n))
        np.testing.assert_array_equal(ours["label"], theirs["label"])
        np.testing.assert_allclose(ours["out"], theirs["out"], rtol=0, atol=2e-6)
        assert (ours["out"].dtype, ours["out"].shape) == (np.float32, (n, 1))
        assert (ours["half"].dtype, ours["none"].shape) == (np.float32, (n, 0))
        (written,) = (
            line
            for line in lines(tmp_path / "ranks", "events")
            if line["event"] == "predictions_written"
        )
        assert (written["file"], written["samples"]) == ("predictions.npz", n)
        assert written["step"] == 4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "exact"])
def test_a_plain_tensor_has_a_name(strategy: str, tmp_path: Path) -> None:
    spec = job(strategy, {"held_out": 7, "bad": "plain"}, train={"steps": 2})
    run_ranks(train, 2, spec, tmp_path, kind=Predicting)
    np.testing.assert_array_equal(rows(tmp_path)["predictions"], np.arange(7))


@pytest.mark.parametrize(
    ("bad", "code", "names"),
    [
        ("reduced", "not-rows", ["'predictions'", "shape ()", "2 samples"]),
        ("short", "not-rows", ["'predictions'", "shape (1, 1)", "2 samples"]),
        ("list", "not-rows", [" list ", "'out'"]),
        ("ragged", "rows-differ", ["'out' with <f4 rows of shape (1,)"]),
        ("unnamed", "rows-differ", ["'label' with <i8 rows of shape ()", "no 'label'"]),
    ],
)
def test_rows_that_belong_to_no_sample_are_an_error(
    bad: str, code: str, names: list[str], tmp_path: Path
) -> None:
    with raises(f"predict.{code}", *names):
        run(1, tmp_path, {"held_out": 7, "bad": bad})
    assert not list(tmp_path.glob("*predictions*"))


def test_ranks_that_predict_different_things_are_an_error(tmp_path: Path) -> None:
    names = ("shape (1,) on rank 0 ", "'out' with <f4 rows of shape (2,) on rank 1")
    with raises("predict.rows-differ", *names):
        run(2, tmp_path, {"held_out": 8, "bad": "ragged"})


@pytest.mark.ranks(1)
def test_only_the_last_evaluation_predicts(tmp_path: Path, rank: int) -> None:
    made = []
    finish = Predictions.finish
    Predictions.finish = lambda self: made.append(1) or finish(self)  # type: ignore[method-assign]
    for every in (1, 3):  # the last is on schedule, or not
        sections = {"train": {"steps": 4}, "eval": {"every_steps": every}}
        train(job("single", {"held_out": 5}, **sections), tmp_path / str(every), kind=Predicting)
        assert len(rows(tmp_path / str(every))["out"]) == 5
        train(job("single", {"held_out": 5}, **sections), tmp_path / str(every), kind=Predicting)
    assert made == [1, 1]


def test_training_that_ends_early_predicts(tmp_path: Path) -> None:
    args = {"held_out": 5, "evaluations": [3.0, 4.0, 4.0]}
    stopping = {"early_stopping": {"patience": 1}, "steps": 40}
    (outcome, _) = run(2, tmp_path, args, train=stopping, eval={"every_steps": 2})
    assert outcome.result is not None
    assert outcome.result.stopped_early
    np.testing.assert_array_equal(rows(tmp_path)["i"], np.arange(5))


def test_a_flag_raised_while_predicting(tmp_path: Path) -> None:
    args = {"held_out": 9}
    leaving = {**args, "stop_in_evaluation": True, "stop_rank": 1}
    first = run(3, tmp_path, leaving, eval={"batch_size": 1})
    assert [o.result.stopped for o in first if o.result] == ["test"] * 3
    assert not list(tmp_path.glob("*predictions*"))
    run(2, tmp_path, args)
    np.testing.assert_array_equal(rows(tmp_path)["i"], np.arange(9))


class Leaving(Predicting):
    """Is asked to leave while it predicts."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        if self.rank == 1:
            self.stop.request("test")
        return super().predict(model, batch)


def test_a_flag_raised_while_predicting_after_an_early_end(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"eval": {"every_steps": 2, "batch_size": 1}}
    sections["train"] = {"early_stopping": {"patience": 1}, "steps": 40}
    args = {"held_out": 9, "evaluations": [3.0, 4.0, 4.0]}
    first = run_ranks(train, 3, job("ddp", args, **sections), tmp_path, kind=Leaving)
    assert [(o.result.stopped, o.result.steps) for o in first if o.result] == [("test", 4)] * 3
    assert not list(tmp_path.glob("*predictions*"))
    run(2, tmp_path, args, **sections)
    np.testing.assert_array_equal(rows(tmp_path)["i"], np.arange(9))
    assert sum(line["split"] == "eval" for line in lines(tmp_path, "metrics")) == 2


def test_any_class_may_predict() -> None:
    assert not predicts(Task())
    assert not predicts(Regression())
    assert predicts(Predicting())
