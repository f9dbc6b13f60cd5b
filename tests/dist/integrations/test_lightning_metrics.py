"""What a LightningModule logs is in metrics.jsonl and with the job's loggers, by its own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

from support.lightning_fit import fit
from support.trainings import lines

CONSTANT = 12345.5
WAYS = ["dtrain", "lightning"]
ALWAYS = {"time", "step", "epoch", "split"}
OF_STEP = {"loss", "lr", "samples_per_second", "train_loss", "both_step", "of_dict", "bar_only"}
OF_EPOCH = {"both_epoch", "of_epoch", "at_the_end", "counted"}


def trained(
    folder: Path, way: str, world_size: int = 1, stop_after: int | None = None, **job: Any
) -> list[dict[str, Any]]:
    """Five steps of 4 samples an epoch, two epochs; the lines of metrics."""
    name = job.pop("name", "Logs")
    job = {
        "train": {"epochs": 2, "global_batch_size": 4},
        "strategy": "single" if world_size == 1 else "ddp",
        "lightning": {"step": way},
        **job,
    }
    fit(folder, f"lightning_logs.py:{name}", job, stop_after)
    return lines(folder, "metrics")


class Reads(TorchFunctionMode):
    """Counts how often a value of module `Constant`, or a sum of it, is read from its device."""

    number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("item", "__float__") and result:
            self.number += result % CONSTANT == 0
        return result


def of(found: list[dict[str, Any]], split: str, name: str) -> list[dict[str, Any]]:
    return [line for line in found if line["split"] == split and name in line]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_names_and_values(way: str, world_size: int, tmp_path: Path) -> None:
    found = trained(tmp_path, way, world_size)
    steps = of(found, "train", "loss")
    assert [line["step"] for line in steps] == [*range(1, 11)]
    assert all(set(line) - ALWAYS == OF_STEP for line in steps), steps[0]
    for line in steps:
        # over the samples of all processes, as the loss is
        assert line["train_loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert line["of_dict"] == line["both_step"] == line["bar_only"]
    assert sum(line["of_dict"] for line in steps[:5]) == pytest.approx(5 * 9.5)
    epochs = of(found, "train", "of_epoch")
    assert [(line["step"], line["epoch"]) for line in epochs] == [(5, 0), (10, 1)]
    for line in epochs:
        assert set(line) - ALWAYS == OF_EPOCH
        assert line["of_epoch"] == line["both_epoch"] == pytest.approx(9.5)
        assert line["counted"] == pytest.approx(9.5)
        assert line["at_the_end"] == 5.0
    evaluations = of(found, "eval", "val_loss")
    assert len(evaluations) == 2
    for line in evaluations:
        assert set(line) - ALWAYS == {"val_loss", "val_both_epoch"}
        assert line["val_loss"] == pytest.approx(2.0)


@pytest.mark.parametrize("way", WAYS)
def test_values_are_read_where_a_line_is_written(way: str, tmp_path: Path) -> None:
    """And not in the steps between: a GPU would wait for each of them."""
    with Reads() as few:
        found = trained(tmp_path / "few", way, name="Constant", log={"every_steps": 100})
    assert [line["step"] for line in of(found, "train", "constant")] == [1, 10]
    with Reads() as all_of_them:
        trained(tmp_path / "all", way, name="Constant", log={"every_steps": 1})
    # two of ten steps, and the epochs' ends, which are the same
    assert 0 < few.number < all_of_them.number
    assert all_of_them.number - few.number == 8 * 2


@pytest.mark.parametrize("way", WAYS)
def test_the_last_step_has_a_line_when_nobody_knew_that_it_would_be(
    way: str, tmp_path: Path
) -> None:
    found = trained(tmp_path, way, stop_after=3, log={"every_steps": 100})
    steps = of(found, "train", "loss")
    told = lines(tmp_path, "events")
    assert [line["step"] for line in steps] == [1, told[-1]["step"]]
    assert told[-1]["event"] == "stopped"
    assert steps[-1]["train_loss"] == pytest.approx(steps[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_loggers_have_the_names_of_the_module(way: str, tmp_path: Path) -> None:
    loggers = ["csv", {"tensorboard": {}}]
    trained(tmp_path, way, log={"every_steps": 5, "loggers": loggers})
    columns = (tmp_path / "train.csv").read_text().splitlines()[0].split(",")
    assert set(columns) >= OF_STEP | OF_EPOCH
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train_loss", "both_step", "both_epoch", "val_loss", "train/loss", "train/lr"} <= tags
    assert not {tag for tag in tags if tag.startswith("eval/")}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
