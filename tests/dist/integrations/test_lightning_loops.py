"""Lightning's own loops: what dtrain does around them, and what of the Trainer's arguments."""

from __future__ import annotations

import math
import multiprocessing
import re
from pathlib import Path
from typing import Any

import lightning_shapes
import pytest
import torch
from lightning_shapes import Points

from dtrain.errors import CheckpointError, UsageError
from dtrain.run.rundir import RunDir
from dtrain.testing import RankError, run_ranks
from dtrain.train.checkpoint.content import read_checkpoint
from support.errors import raises
from support.launch import events, metrics
from support.lightning_fit import by_lightning, fit


def trainer(**arguments: Any) -> dict[str, Any]:
    return {"lightning": {"trainer": arguments}}


@pytest.mark.parametrize(
    ("arguments", "trained", "validated", "sane"),
    [
        ({"fast_dev_run": True}, 1, 1, 0),
        ({"limit_train_batches": 2}, 4, 12, 0),
        ({"limit_train_batches": 0.5, "limit_val_batches": 3}, 4, 6, 0),
        ({"overfit_batches": 1}, 2, 2, 0),
        ({"num_sanity_val_steps": 2}, 8, 12, 2),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 1}, 8, 24, 0),
        ({"accumulate_grad_batches": 2}, 8, 12, 0),
    ],
)
def test_arguments_that_only_its_loops_follow(
    arguments: dict[str, Any], trained: int, validated: int, sane: int, tmp_path: Path
) -> None:
    own = "check_val_every_n_epoch" in arguments
    job = {**trainer(**arguments), **({"eval": {}} if own else {})}
    done = fit(tmp_path, "Counting", job)
    counts = done.module.trained, done.module.validated, done.module.sane
    assert counts == (trained, validated, sane)
    assert f"lightning.trainer.{next(iter(arguments))} " in str(done.why)


def test_an_epoch_that_is_cut_short_is_the_beginning_of_another(tmp_path: Path) -> None:
    """With `limit_train_batches`: each epoch has an order of its own, also after a resume."""
    job = {**trainer(limit_train_batches=2), "train": {"epochs": 3}}
    whole = fit(tmp_path / "whole", "Counting", job)
    cut = fit(tmp_path / "cut", "Counting", job, stop_after=3)
    resumed = fit(tmp_path / "cut", "Counting", job)
    assert (whole.steps, cut.steps, resumed.steps) == (6, 3, 6)
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value)


def test_averaged_weights_are_what_training_ends_with(tmp_path: Path) -> None:
    mine = fit(tmp_path, "Swa", {"train": {"epochs": 3}})
    theirs = by_lightning(lightning_shapes.Swa, max_epochs=3)
    assert "StochasticWeightAveraging" in str(mine.why)
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(mine.parameters[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "job", "code", "words"),
    [
        ("FindsRate", {}, "lightning.tuner-callback", "LearningRateFinder"),
        ("FindsBatchSize", {}, "lightning.tuner-callback", "BatchSizeFinder"),
        (
            *("Manual", {"train": {"micro_batch_size": 4}}, "lightning.manual-optimization"),
            "train.micro_batch_size",
        ),
        (
            *("Manual", {"train": {"clip_grad_norm": 1.0}}, "lightning.manual-optimization"),
            "train.clip_grad_norm",
        ),
        ("Manual", {"strategy": "exact"}, "plan.unsupported-combination", "'exact'"),
        *(
            ("Manual", {"train": {name: True}}, "plan.unsupported-combination", f"train.{name}")
            for name in ("compile", "activation_checkpointing")
        ),
        (
            *("Counting", {"eval": {"every_epochs": 1, "every_steps": 1}}),
            *("lightning.two-intervals", "eval.every_steps"),
        ),
        (
            *("Counting", {**trainer(gradient_clip_val=1.0), "train": {"clip_grad_norm": 1.0}}),
            *("lightning.given-twice", "lightning.trainer.gradient_clip_val and train.clip_grad_n"),
        ),
        ("Counting", trainer(limit_train_batches=0), "lightning.no-batches", "Counting"),
        ("Counting", {"lightning": {"step": "dtrain"}}, "lightning.needs-own-loops", "Counting"),
    ],
)
def test_what_cannot_be_is_told(
    name: str, job: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    with raises(code, words, kind=UsageError):
        fit(tmp_path, name, job)


def test_a_checkpoint_of_the_other_way_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, "Plain", {}, stop_after=3)
    with raises("checkpoint.none-loads", "dtrain's step", kind=CheckpointError):
        fit(tmp_path, "Plain", {"lightning": {"step": "lightning"}})


def test_the_newest_checkpoint_that_is_whole_is_taken(tmp_path: Path) -> None:
    job = {"checkpoint": {"every_steps": 2}}
    whole = fit(tmp_path / "whole", "Counting", job)
    fit(tmp_path / "cut", "Counting", job, stop_after=5)
    run = RunDir(tmp_path / "cut")
    (newest,) = run.checkpoint(5).glob("rank*")
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    resumed = fit(tmp_path / "cut", "Counting", job)
    (event,) = events(run, "resumed")
    assert event["step"] == 4
    assert list(event["rejected"]) == ["step-00000005"]
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value)


def micro(folder: Path, size: int | None, strategy: str) -> dict[str, torch.Tensor]:
    train = {"global_batch_size": 15, "micro_batch_size": size, "clip_grad_norm": 0.1}
    return fit(folder, "Counting", {"train": train, "strategy": strategy}).parameters


@pytest.mark.parametrize(
    ("ranks", "size", "strategy"),
    [(1, 5, "ddp"), (2, 3, "fsdp"), (3, None, "ddp"), (3, 2, "fsdp"), (3, 2, "ddp"), (4, 1, "ddp")],
)
def test_every_sample_of_a_step_weighs_the_same(
    ranks: int, size: int | None, strategy: str, tmp_path: Path
) -> None:
    """On any number of ranks and micro-batches, of unequal size; the end of an epoch too."""
    expected = micro(tmp_path / "one", None, "single")
    for mine in run_ranks(micro, ranks, tmp_path / "several", size, strategy):
        for name, value in expected.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-6)


def resumed_elsewhere(folder: Path, stop: int | None) -> tuple[dict[str, torch.Tensor], Any]:
    job = {"train": {"global_batch_size": 15}}
    done = fit(folder, "CountedByHand", job, stop_after=stop)
    return done.parameters, done.remembered


def test_goes_on_in_mid_epoch_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Samples, weights, and what objects of torchmetrics have counted."""
    expected = fit(tmp_path / "whole", "CountedByHand", {"train": {"global_batch_size": 15}})
    run_ranks(resumed_elsewhere, 2, tmp_path / "cut", 6)
    for parameters, counted in run_ranks(resumed_elsewhere, 3, tmp_path / "cut", None):
        for name, value in expected.parameters.items():
            torch.testing.assert_close(parameters[name], value, rtol=0, atol=2e-6)
        error = counted["error"]  # synchronised by torchmetrics; the mean is each rank's own
        torch.testing.assert_close(error, expected.remembered["error"], rtol=0, atol=2e-6)


def ranks_logs(folder: Path) -> dict[str, float]:
    return fit(folder, "RankLogs", {"train": {"global_batch_size": 15}}).metrics


def test_logged_values_are_put_together_over_all_samples(tmp_path: Path) -> None:
    """21 samples over three ranks; also one that only one rank logs, for which nobody waits."""
    expected = ranks_logs(tmp_path / "one")
    assert expected["count"] == 21
    assert expected["largest"] == pytest.approx(float(Points(21, 2).y.max()))
    for mine in run_ranks(ranks_logs, 3, tmp_path / "three"):
        assert {**mine, "of_one": 3.0} == pytest.approx(expected, abs=2e-6)


on_both = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


def spoilt(folder: Path, policy: str, strategy: str) -> tuple[int, float]:
    done = fit(folder, "NaN", {"checks": {"on_nan": policy}, "strategy": strategy})
    worst = max(float(each.abs().max()) for each in done.parameters.values())
    return done.steps, worst


@on_both
def test_a_loss_that_is_no_number_is_named(strategy: str, tmp_path: Path) -> None:
    with raises("check.not-finite", "loss", " nan") as caught:
        run_ranks(spoilt, 2, tmp_path, "stop", strategy)
    assert re.search(r"step \d .* on rank \d, .* 7[,\s]", str(caught.value))


@on_both
def test_a_step_of_nan_is_left_out(strategy: str, tmp_path: Path) -> None:
    for steps, worst in run_ranks(spoilt, 2, tmp_path, "skip", strategy):
        assert steps == 8
        assert math.isfinite(worst)


FAULTS = {
    "flip-parameter-bit": ("check.replicas-differ", "parameters: net.0.weight"),
    "flip-gradient-bit": ("check.replicas-differ", "parameters: "),
    "flip-moment-bit": ("check.replicas-differ", "optimizer state: "),
    "flip-buffer-bit": ("check.replicas-differ", "buffers: "),
    "nan-gradient": ("check.not-finite", "step 3"),
    "duplicate-sample": ("data.not-exactly-once", "step 3: "),
    "lr": ("check.replicas-differ", "learning rate"),
    "nan-loss": ("check.not-finite", "loss of step 3 is nan"),
}
"""Kinds, and the code of each with what must be named."""


def faulty(folder: Path, kind: str, strategy: str) -> None:
    checks = {"every_steps": 1, "inject": [f"rank=1,step=3,kind={kind}"]}
    job = {"checks": checks, "train": {"global_batch_size": 15}, "strategy": strategy}
    fit(folder, "Normed", job)


OF_PARTS = ("flip-parameter-bit", "flip-moment-bit", "nan-gradient")
"""Kinds that are looked for in another way where parameters are cut."""


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [*((kind, "ddp") for kind in FAULTS), *((kind, "fsdp") for kind in OF_PARTS)],
)
def test_faults_are_found(kind: str, strategy: str, tmp_path: Path) -> None:
    with raises(*FAULTS[kind]):
        run_ranks(faulty, 2, tmp_path, kind, strategy)


def rolled_back(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    checks = {
        "every_steps": 1,
        "on_mismatch": "rollback",
        "inject": ["rank=1,step=4,kind=flip-parameter-bit"],
    }
    job = {"checks": checks, "train": {"global_batch_size": 15}}
    done = fit(folder, "Normed", {**job, "checkpoint": {"every_steps": 3}})
    return done.steps, done.parameters


def test_goes_back_to_the_newest_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(rolled_back, 2, tmp_path)
    assert first[0] == second[0] == 8
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    (resumed,) = events(RunDir(tmp_path), "resumed")
    assert resumed["step"] == 3


def left_in_validation(
    folder: Path, strategy: str
) -> tuple[list[Any], list[dict[str, torch.Tensor]], list[int]]:
    job = {"strategy": strategy}
    whole = fit(folder / "whole", "StopsInValidation", job)
    cut = fit(folder / "cut", "StopsInValidation", job, stop_attribute=True)
    resumed = fit(folder / "cut", "StopsInValidation", job)
    counts = [cut.module.validated, resumed.module.validated, resumed.steps]
    return [whole.metrics, resumed.metrics], [whole.parameters, resumed.parameters], counts


@on_both
def test_a_validation_that_is_left_is_run_again(strategy: str, tmp_path: Path) -> None:
    for known, (whole, resumed), counts in run_ranks(left_in_validation, 2, tmp_path, strategy):
        assert known[0] == known[1]
        assert counts == [3 + 2, 3, 8]
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_early_stopping_and_the_best_checkpoint_are_the_jobs(tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "train": {
            "epochs": 30,
            "early_stopping": {"metric": "val_loss", "patience": 2, "min_delta": 1.0},
        },
        "checkpoint": {"best": {"metric": "val_loss", "mode": "min"}},
    }
    done = fit(tmp_path, "Counting", job)
    assert done.steps == 3 * 4
    run = RunDir(tmp_path)
    assert (run.checkpoints / "best" / "manifest.json").is_file()
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all({"loss", "lr", "samples_per_second"} <= set(line) for line in lines)


def test_bf16(tmp_path: Path) -> None:
    mine = fit(tmp_path, "Counting", {"train": {"precision": "bf16"}})
    theirs = by_lightning(lightning_shapes.Counting, precision="bf16-mixed")
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(mine.parameters[name], value, rtol=0, atol=2e-6)


def test_a_later_end_goes_on_where_steps_ended_it(tmp_path: Path) -> None:
    """`train.steps` cuts an epoch, and a later end goes on with the rest of it."""
    steps: dict[str, Any] = {"train": {"epochs": None, "steps": 8}}
    whole = fit(tmp_path / "whole", "Counting", steps)
    fit(tmp_path / "cut", "Counting", {"train": {"epochs": None, "steps": 6}})
    longer = fit(tmp_path / "cut", "Counting", steps)
    assert longer.steps == whole.steps == 8
    for name, value in whole.parameters.items():
        assert torch.equal(longer.parameters[name], value)


def test_an_end_that_is_past_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, "Counting", {"train": {"epochs": 3}})
    with raises("run.end-passed", "of epoch 3", "after epoch 2", "train.epochs=6"):
        fit(tmp_path, "Counting", {"train": {"epochs": 2}})


def test_a_run_that_is_complete_trains_nothing_more(tmp_path: Path) -> None:
    first = fit(tmp_path, "Counting", {})
    second = fit(tmp_path, "Counting", {})
    assert second.steps == first.steps == 8
    assert second.module.trained == 0


def test_a_training_that_was_stopped_early_stays_so(tmp_path: Path) -> None:
    """By a callback of Lightning's; its files are Lightning's, and whole."""
    first = fit(tmp_path, "Saves", {"train": {"epochs": 9}})
    assert first.steps == 8
    second = fit(tmp_path, "Saves", {"train": {"epochs": 9}})
    assert (second.steps, second.told[-1]) == (8, "finished")
    third = fit(tmp_path, "Saves", {"train": {"epochs": 10}})
    assert third.steps == 12  # it has another end, so it goes on; and then there is none better
    files = sorted((tmp_path / "lightning").rglob("*step=6.ckpt"))
    assert files[0].with_name(files[0].name + ".xxh3").is_file()
    module = lightning_shapes.Saves.load_from_checkpoint(files[0])
    assert set(module.state_dict()) == set(first.parameters)


def test_an_average_at_the_end_is_in_the_last_checkpoint(tmp_path: Path) -> None:
    job = {"train": {"epochs": 3}, "checkpoint": {"every_epochs": 1}}
    done = fit(tmp_path, "Swa", job)
    state = read_checkpoint(RunDir(tmp_path).checkpoint(12))[0]["model"]
    assert all(torch.equal(state[name], value) for name, value in done.parameters.items())


@pytest.mark.parametrize("train", [{"epochs": 1}, {"epochs": None, "steps": 2}])
def test_its_loader_processes_end_with_it(train: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, "Counting", {"train": train, "data": {"workers": 1}})
    assert multiprocessing.active_children() == []


ALSO = {"lightning": {"also_run": ["validate", "test", "predict"]}}


def also_run(folder: Path, strategy: str) -> tuple[dict[str, torch.Tensor], int]:
    job = {**ALSO, "train": {"global_batch_size": 15}, "strategy": strategy}
    done = fit(folder, "Tested", job)
    return done.parameters, done.steps


def makes_layers_again(folder: Path) -> None:
    job = {"lightning": {"also_run": ["validate"]}, "strategy": "fsdp"}
    with raises("lightning.layers-made-again", "LateLayers", "net.0.weight", kind=UsageError):
        fit(folder, "LateLayers", job)


def test_layers_that_are_made_again_after_they_were_sharded(tmp_path: Path) -> None:
    run_ranks(makes_layers_again, 2, tmp_path)


@on_both
def test_validates_before_and_tests_and_predicts_after(strategy: str, tmp_path: Path) -> None:
    """Over uneven ranks each sample is tested once, and predicted once."""
    (parameters, _), *_ = run_ranks(also_run, 2, tmp_path, strategy)
    run = RunDir(tmp_path)
    splits = {name: metrics(run, name)[0] for name in ("validate", "test")}
    assert (splits["validate"]["step"], splits["test"]["step"]) == (0, 8)
    module = lightning_shapes.Tested()
    module.load_state_dict(parameters)
    points = Points(23, 4)
    with torch.no_grad():
        loss = float(torch.nn.functional.mse_loss(module(points.x), points.y))
        expected = module(Points(10, 5).x)
    assert splits["test"]["test_loss"] == pytest.approx(loss, abs=2e-6)
    assert splits["test"]["tested"] == 23
    (finished,) = events(run, "finished")
    assert {"val_loss", "test_loss"} <= set(finished["metrics"])
    found = torch.full((10, 1), float("nan"))
    for file in sorted((tmp_path / "lightning").glob("predictions-*.pt")):
        kept = torch.load(file)
        found[kept["ids"]] = kept["rows"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def unused(folder: Path, find: bool) -> int:
    return fit(folder, "LeftOut", {"lightning": {"find_unused": find}}).steps


def test_parameters_without_a_part_in_the_loss(tmp_path: Path) -> None:
    assert run_ranks(unused, 2, tmp_path / "found", True) == [8, 8]
    with pytest.raises(RankError, match=r"lightning\.find_unused: true"):  # a note on torch's
        run_ranks(unused, 2, tmp_path / "not", False)


def test_errors_name_the_callback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fit(tmp_path, "Fails", {})
    assert caught.value.__notes__[0] == "in on_train_batch_end() of callback Failing"
