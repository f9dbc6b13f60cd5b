"""A user's own LightningModule: the same samples and parameters as by hand, exact metrics."""

from __future__ import annotations

import multiprocessing
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_modules
from dtrain import catalog
from dtrain.errors import CheckpointError, JobError
from dtrain.integrations.lightning.environment import SafeCheckpointIO
from dtrain.integrations.lightning.module import ModuleTask
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import StopFlag, TrainContext, TrainResult
from dtrain.train.data.permutation import Permutation
from dtrain.train.load import load_task
from lightning_modules import Lit, Points
from support import JOBS
from support.errors import raises


@dataclass
class Done:
    result: TrainResult
    parameters: dict[str, torch.Tensor]
    seen: list[list[int]]
    heard: list[str]
    metrics: dict[str, float]
    epochs: list[float]
    """The mean loss of each epoch."""


def fit(folder: Path, strategy: str = "ddp", name: str = "Lit", **sections: Any) -> Done:
    torch.set_num_threads(1)
    stop_after = sections.pop("stop_after", None)
    spec = JobSpec.model_validate(
        {
            "name": "lit",
            "task": f"lightning_modules.py:{name}",
            "trainer": "lightning",
            "strategy": strategy,
            "seed": 3,
            "eval": {"every_epochs": 1},
            **sections,
            "lightning": {"step": "dtrain", **sections.get("lightning", {})},
            "train": {"epochs": 3, "global_batch_size": 16, **sections.get("train", {})},
        }
    )
    run = RunDir(folder)
    run.create()
    ranks = RankInfo() if strategy == "single" else RankInfo.from_env()
    task = load_task(spec.task, spec.args, JOBS, "lightning")
    assert isinstance(task, ModuleTask)
    stop = StopFlag()
    cpu = torch.device("cpu")
    context = TrainContext(spec, run, ranks, 0, task, cpu, 1, stop, code_dir=JOBS)
    if stop_after is not None:
        make = task.model

        def stopping() -> Any:
            module: Any = make()
            module.on_train_batch_start = lambda batch, i: (
                stop.request("test") if module.global_step == stop_after - 1 else None
            )
            return module

        task.model = stopping  # type: ignore[method-assign]
    result = catalog.load("trainer", "lightning")(context).run()
    module: Any = task.module
    state = module.state_dict()
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in state.items()}
    values = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    parameters = {name: value.detach().clone() for name, value in whole.items()}
    return Done(result, parameters, module.seen[:-1], module.heard, values, module.epochs)


def by_hand(parameters: dict[str, torch.Tensor], epochs: int = 3) -> nn.Module:
    """The plain loop that the job describes."""
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    net.load_state_dict(parameters)
    data = Points(50)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(epochs):
        order = Permutation(50, 3, epoch).block(0, 50)
        for start in range(0, 50, 16):
            ids = torch.from_numpy(order[start : start + 16])
            optimizer.zero_grad()
            nn.functional.mse_loss(net(data.x[ids]), data.y[ids]).backward()
            optimizer.step()
        scheduler.step()
    return net


def beginning() -> dict[str, torch.Tensor]:
    """The parameters that the job's seed gives."""
    from dtrain.train.seeding import derive_seed, seed_everything

    seed_everything(derive_seed("model", 3))
    return dict(Lit().net.state_dict())


def check_like_by_hand(done: Done) -> None:
    for name, value in by_hand(beginning()).state_dict().items():
        torch.testing.assert_close(done.parameters[f"net.{name}"], value, rtol=0, atol=1e-6)


def check_metrics(done: Done) -> None:
    """21 samples over uneven ranks and batches: what one pass over all of them gives."""
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    net.load_state_dict({n.removeprefix("net."): v for n, v in done.parameters.items()})
    data = Points(21)
    with torch.no_grad():
        out = net(data.x)
    expected = {
        "val_loss": nn.functional.mse_loss(out, data.y).item(),
        "error": (out - data.y).abs().mean().item(),
        "id": 10.0,
        "one": 1.0,
        "from_the_end": 2.0,
    }
    assert done.result.metrics == pytest.approx(expected, abs=1e-6)
    assert done.metrics["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)


def test_one_process(tmp_path: Path) -> None:
    done = fit(tmp_path, "single")
    check_like_by_hand(done)
    check_metrics(done)
    assert [len(ids) for ids in done.seen] == [16, 16, 16, 2] * 3
    steps = [text for text in done.heard if text != "validated"]
    assert steps[4] == "step 5 epoch 1 batch 0"
    assert done.heard.count("validated") == 3


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")]
)  # 4: two of them have no sample in the last step
def test_several_ranks(world_size: int, strategy: str, tmp_path: Path) -> None:
    done = fit(tmp_path, strategy)
    check_like_by_hand(done)
    check_metrics(done)


def test_resumed_in_the_middle_of_an_epoch_on_another_number_of_ranks(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", "single")
    head = run_ranks(fit, 2, tmp_path / "cut", stop_after=6)
    tail = run_ranks(fit, 3, tmp_path / "cut")
    assert head[0].result.stopped == "test"
    steps = [
        [i for part in parts for i in part]
        for ranks in (head, tail)
        for parts in zip(*(each.seen for each in ranks), strict=True)
    ]
    assert steps == whole.seen
    for each in tail:  # of epoch 1 the means of all its steps, before the cut too
        assert [head[0].epochs[0], *each.epochs] == pytest.approx(whole.epochs, rel=1e-6)
    for name, value in whole.parameters.items():
        torch.testing.assert_close(tail[0].parameters[name], value, rtol=0, atol=1e-6)


def by_lightning(module: Any, parameters: dict[str, torch.Tensor]) -> tuple[set[str], Any]:
    """What Lightning alone, in one process, knows after a fit; and of a model's validation."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Slurm, and of loader processes it would like to have
        trainer = lightning_modules.pl.Trainer(
            accelerator="cpu", max_epochs=1, **dict.fromkeys(quiet, False)
        )
        trainer.fit(module)
        known = set(trainer.callback_metrics)
        module.load_state_dict(parameters)
        trainer.validate(module, verbose=False)
    return known, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("name", "args"), [("Lit", {}), ("TwoSets", {}), ("TwoSets", {"by_name": True})]
)
def test_metrics_have_the_names_and_values_that_lightning_gives_them(
    name: str, args: dict[str, Any], tmp_path: Path
) -> None:
    """Of one validation loader and of several, over uneven ranks."""
    done = run_ranks(fit, 3, tmp_path, name=name, args=args, train={"epochs": 2})[1]
    names, expected = by_lightning(getattr(lightning_modules, name)(**args), done.parameters)
    assert set(done.metrics) == names
    assert {name: done.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    validated = [text for text in done.heard if text.startswith("set")]
    if name == "TwoSets":  # of 21 and 5 samples, of which rank 1 has 7 and 2
        assert validated == ["set 0 batch 0", "set 0 batch 1", "set 1 batch 0"] * 2


def test_a_data_module(tmp_path: Path) -> None:
    data = {"data_module": "lightning_modules.py:Data", "data_args": {"n": 50}}
    done = fit(tmp_path, "single", lightning=data)
    check_like_by_hand(done)


def set_up(folder: Path, **sections: Any) -> tuple[list[str], list[str]]:
    """What was called of module and data module."""
    modules: list[Any] = []
    begin = ModuleTask.begin

    def kept(task: ModuleTask, *args: Any) -> None:
        modules[:] = [task.module, task.data_module]
        begin(task, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModuleTask, "begin", kept)
        fit(folder, "ddp", "SetUp", train={"epochs": 1}, **sections)
    module, data = modules
    return module.called, data.called


@pytest.mark.parametrize("per_node", [True, False])
def test_data_are_prepared_and_set_up_once(per_node: bool, tmp_path: Path) -> None:
    data = {"data_module": "lightning_modules.py:Data", "data_args": {"n": 50}}
    sections = {"args": {"per_node": per_node}, "lightning": data}
    first, *others = run_ranks(set_up, 2, tmp_path, **sections)
    assert first == (["prepare_data", "setup fit"], ["prepare_data", "setup fit"])
    assert others == [(["setup fit"], ["setup fit"])]


@pytest.mark.parametrize("train", [{"epochs": 1}, {"epochs": None, "steps": 2}])
def test_its_loader_processes_end_with_it(train: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, "single", train={**train, "micro_batch_size": 3}, data={"workers": 1})
    assert multiprocessing.active_children() == []


def test_arguments_of_the_trainer(tmp_path: Path) -> None:
    fit(tmp_path, "single", lightning={"trainer": {"logger": True}}, train={"epochs": 1})
    (log,) = (tmp_path / "lightning").rglob("events.out.tfevents.*")
    assert log.stat().st_size > 0


LOGGED: dict[str, Any] = {"train": {"epochs": 9}, "lightning": {"trainer": {"logger": True}}}


def test_callbacks_of_lightnings_own(tmp_path: Path) -> None:
    """Their files have a digest; what they remember goes on; when they stop, training is done."""
    cut = {**LOGGED, "name": "WithCallbacks", "stop_after": 6}
    run_ranks(fit, 2, tmp_path, **cut)
    done = run_ranks(fit, 2, tmp_path, **{**LOGGED, "name": "WithCallbacks"})
    for each in done:  # the best at the end of epoch 1, then two evaluations without a better one
        assert (each.result.steps, each.result.stopped_early) == (12, True)
        assert each.result.stopped is None
    best = sorted((tmp_path / "lightning").rglob("best-*.ckpt"))[-1]
    kept = SafeCheckpointIO().load_checkpoint(best, weights_only=False)
    assert set(kept["state_dict"]) == set(done[0].parameters)
    damaged = bytearray(best.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    best.write_bytes(damaged)
    with raises("checkpoint.damaged-file", best.name, kind=CheckpointError):
        SafeCheckpointIO().load_checkpoint(best, weights_only=False)


@pytest.mark.parametrize(
    ("name", "sections", "code", "names"),
    [
        ("Swaps", {}, "needs-own-loops", ["StochasticWeightAveraging"]),
        ("Several", {}, "needs-own-loops", ["configure_optimizers() of Several", " 2"]),
        ("Manual", {}, "needs-own-loops", ["Manual", "automatic_optimization = False"]),
        ("OwnSchedule", {}, "needs-own-loops", ["OwnSchedule", "lr_scheduler_step()"]),
        ("OwnBatches", {}, "needs-own-loops", ["OwnBatches", "batches", "list"]),
        ("Batched", {}, "needs-own-loops", ["Batched", "batch_size=None"]),
        ("DrawnEvaluation", {}, "needs-own-loops",
         ["RandomSampler (num_samples 9, replacement False)"]),
        ("Hooked", {}, "needs-own-loops", ["Hooked", "on_after_backward()"]),
        ("Averaged", {}, "needs-own-loops", ["EMAWeightAveraging", "on_save_checkpoint()"]),
        ("NoIndex", {}, "no-dataloader-idx", ["2 loaders"]),
        ("OneName", {}, "log-of-two-loaders", ["self.log('loss')"]),
        ("OneMetric", {}, "log-of-two-loaders", ["'error/dataloader_idx_1'"]),
        ("Sums", {}, "log-not-a-mean", ["self.log('count', reduce_fx=sum)"]),
        ("NoLoss", {}, "needs-own-loops", ["training_step() of NoLoss", "None"]),
        ("Lit", {"lightning": {"trainer": {"logr": 1}}}, "trainer-refused", ["logr"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    name: str, sections: dict[str, Any], code: str, names: list[str], tmp_path: Path
) -> None:
    with raises(f"lightning.{code}", *names):
        fit(tmp_path, "single", name, **sections)


@pytest.mark.parametrize(
    ("name", "order", "mean_id"),
    [("OwnSampler", list(range(49, -1, -1)), 10), ("Drawn", None, 10), ("PartByASampler", None, 2)],
)
def test_samplers_of_ones_own_are_dealt_out(
    name: str, order: list[int] | None, mean_id: float, tmp_path: Path
) -> None:
    """Alike on any number of ranks, also after a resume in mid-epoch on another number."""
    whole = fit(tmp_path / "whole", "single", name)
    head = run_ranks(fit, 2, tmp_path / "cut", name=name, stop_after=3)
    tail = run_ranks(fit, 3, tmp_path / "cut", name=name)
    steps = [
        [i for part in parts for i in part]
        for ranks in (head, tail)
        for parts in zip(*(each.seen for each in ranks), strict=True)
    ]
    assert steps == whole.seen
    assert order is None or [i for each in whole.seen[:4] for i in each] == order
    assert tail[0].result.metrics["id"] == mean_id


def test_under_native_it_says_which_trainer() -> None:
    assert lightning_modules.Lit is Lit
    with raises("lightning.needs-trainer", "Lit", kind=JobError):
        load_task("lightning_modules.py:Lit", {}, JOBS)
