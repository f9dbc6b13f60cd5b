"""One training, however it is placed: strategies, world sizes, nodes, micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.testing import run_ranks
from dtrain.train.data.permutation import Permutation
from dtrain.train.seeding import derive_seed, seed_everything
from support.trainings import Numbers, Outcome, Regression, job, lines, losses, steps_of, train

PLACEMENTS = {
    "single": ("single", 1, 1, 1),
    "dp-1": ("dp", 1, 1, 1),
    "dp-2": ("dp", 1, 1, 2),
    "dp-3": ("dp", 1, 1, 3),
    "ddp-1": ("ddp", 1, 1, 1),
    "ddp-2": ("ddp", 2, 1, 1),
    "ddp-4": ("ddp", 4, 1, 1),
    "ddp-2x2": ("ddp", 4, 2, 1),
}


def placed(
    placement: str, folder: Path, args: dict[str, Any] | None = None, **sections: Any
) -> list[Outcome]:
    strategy, world_size, nodes, replicas = PLACEMENTS[placement]
    spec = job(strategy, args, **sections)
    return run_ranks(train, world_size, spec, folder, replicas, nodes=nodes)


def same(one: Outcome, other: Outcome, rtol: float) -> None:
    for name, value in one.parameters.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            other.parameters[name], value, rtol=0, atol=rtol * scale, err_msg=name
        )


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "single"])
def test_every_placement_is_the_training_of_one_process(placement: str, tmp_path: Path) -> None:
    # 50 samples in batches of 16: the fourth step of an epoch has two, fewer than four ranks
    (single,) = placed("single", tmp_path / "single")
    outcomes = placed(placement, tmp_path / "other")
    assert steps_of(outcomes) == single.seen
    assert len(losses(tmp_path / "single")) == 10
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "single"), rtol=2e-6)
    for outcome in outcomes:
        same(single, outcome, 1e-5)
        assert outcome.result is not None
        assert outcome.result.parameters_sha256 == outcomes[0].result.parameters_sha256


def by_hand(n: int, batch: int, steps: int, clip: float | None) -> dict[str, np.ndarray[Any, Any]]:
    """The same training written down directly: fp64, whole batches, sum of losses / weights."""
    task = Regression(n, dtype="float64")
    seed_everything(derive_seed("model", 3))
    model = task.model()
    data = Numbers(n, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    per_epoch = -(-n // batch)
    for step in range(steps):
        epoch, index = divmod(step, per_epoch)
        order = Permutation(n, 3, epoch).block(index * batch, min((index + 1) * batch, n))
        x, y, w = data.x[order], data.y[order], data.w[order]
        errors = (model.predict(x) - y).square().squeeze(1)
        optimizer.zero_grad()
        ((errors * w).sum() / w.sum()).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("n", "batch", "micro", "clip"),
    [
        pytest.param(50, 16, None, None, id="plain"),
        pytest.param(50, 16, 3, 0.05, id="accumulate-clip"),
        pytest.param(50, 3, None, None, id="fewer-than-ranks"),
        pytest.param(5, 16, 2, None, id="one-small-batch"),
        pytest.param(17, 16, 1, 0.05, id="one-left-over"),
    ],
)
def test_weighted_losses_in_fp64_against_a_loop_by_hand(
    n: int, batch: int, micro: int | None, clip: float | None, tmp_path: Path
) -> None:
    (reference,) = run_ranks(by_hand, 1, n, batch, 10, clip)
    sizes = {"global_batch_size": batch, "micro_batch_size": micro, "clip_grad_norm": clip}
    for placement in ("single", "dp-3", "ddp-2", "ddp-4"):
        outcomes = placed(
            placement,
            tmp_path / placement,
            {"n": n, "dtype": "float64", "weighted": True},
            train=sizes,
        )
        for outcome in outcomes:
            for name, value in reference.items():
                np.testing.assert_allclose(outcome.parameters[name], value, rtol=0, atol=1e-12)


def test_batch_norm_sees_the_same_parts_in_dp_and_ddp(tmp_path: Path) -> None:
    args = {"n": 48, "norm": True}
    dp = placed("dp-2", tmp_path / "dp", args)[0]
    ddp = placed("ddp-2", tmp_path / "ddp", args)
    same(dp, ddp[0], 1e-5)
    assert "norm.running_mean" in dp.parameters
    for name, value in ddp[0].parameters.items():  # buffers too are equal at a step boundary
        np.testing.assert_array_equal(ddp[1].parameters[name], value, err_msg=name)


def test_parameters_that_nobody_uses_keep_no_gradient(tmp_path: Path) -> None:
    # AdamW would decay a parameter with a gradient of zero, and leaves one without alone
    args = {"spare": "never", "optimizer": "adamw", "dtype": "float64"}
    (single,) = placed("single", tmp_path / "single", args)
    for placement in ("dp-2", "ddp-4"):
        for outcome in placed(placement, tmp_path / placement, args):
            same(single, outcome, 1e-10)


def test_parameters_used_by_some_samples_only(tmp_path: Path) -> None:
    # in the first step every rank uses the layer: its absence shows in the second, during backward
    args = {"spare": "sometimes", "optimizer": "plain", "dtype": "float64"}
    sizes = {"global_batch_size": 3, "micro_batch_size": 1}
    (single,) = placed("single", tmp_path / "single", args, train=sizes)
    for outcome in placed("ddp-4", tmp_path / "ddp", args, train=sizes):
        same(single, outcome, 1e-10)


def test_bf16_agrees_between_ranks(tmp_path: Path) -> None:
    sizes = {"precision": "bf16", "micro_batch_size": 3, "clip_grad_norm": 1.0}
    placed("single", tmp_path / "single", train=sizes)
    outcomes = placed("ddp-4", tmp_path / "ddp", train=sizes)
    assert len({o.result.parameters_sha256 for o in outcomes if o.result}) == 1
    np.testing.assert_allclose(losses(tmp_path / "ddp"), losses(tmp_path / "single"), rtol=0.02)


def test_fp16_skips_the_same_steps_on_every_rank(tmp_path: Path) -> None:
    # scaled by 2**16, these gradients overflow a few times before the scale is small enough
    sizes = {"precision": "fp16", "clip_grad_norm": 1.0}
    outcomes = placed("ddp-4", tmp_path, {"scale": 30.0}, train=sizes)
    for outcome in outcomes:
        assert outcome.result is not None
        assert outcome.result.steps == 10
        assert outcome.result.parameters_sha256 == outcomes[0].result.parameters_sha256
        # an entry for each step that the optimizer really took
        assert 0 < len(outcome.seen) == len(outcomes[0].seen) < 10
    rates = {line["lr"] for line in lines(tmp_path, "metrics")}
    assert len(rates) == len(outcomes[0].seen)  # the scheduler waits with the optimizer


def test_fp16_without_overflow_is_the_training_of_one_process(tmp_path: Path) -> None:
    args, sizes = {"scale": 0.1}, {"precision": "fp16"}
    (single,) = placed("single", tmp_path / "single", args, train=sizes)
    for placement in ("dp-2", "ddp-4"):
        outcomes = placed(placement, tmp_path / placement, args, train=sizes)
        assert len(outcomes[0].seen) == len(single.seen) == 10
        np.testing.assert_allclose(
            losses(tmp_path / placement), losses(tmp_path / "single"), rtol=0.01
        )
