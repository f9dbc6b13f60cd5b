"""What happens on a mismatch or a NaN, and that nothing is said where nothing is wrong."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dtrain as package
from dtrain import Task
from dtrain.errors import format_error
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checks.finite import NonFiniteError
from dtrain.train.checks.initial_state import compare_surroundings
from dtrain.train.checks.replicas import ReplicaError
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.load import load_task
from dtrain.train.loop.native import NativeTrainer
from support import EXAMPLES, JOBS
from support.errors import assert_named, assert_shown
from support.faults import STEPS, Talkative
from support.launch import TINY, dtrain
from support.trainings import Regression, job, lines
from support.trainings import train as train_regression

# -- nothing wrong ---------------------------------------------------------------------------

SMALL = {
    "digits": {},
    "text": {"width": 16, "depth": 1, "length": 32, "modules": 10},
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16"},
    {"micro_batch_size": 3, "clip_grad_norm": 0.5},
    {"precision": "bf16", "clip_grad_norm": 1.0, "micro_batch_size": 5},
    {"precision": "fp16"},
]
STRATEGIES = ["ddp", "exact", "fsdp"]


class Dropping(Regression):
    """BatchNorm and dropout, whose random numbers and statistics are each rank's own."""

    def __init__(self, **args: Any) -> None:
        super().__init__(norm=True, dropout=0.3, **args)


def example(name: str) -> Task:
    path = EXAMPLES / name / "task.py"
    spec = importlib.util.spec_from_file_location(f"{name}_task", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Task)]
    (kind,) = [each for each in kinds if each.__module__ == module.__name__]
    return kind(**SMALL[name])


def clean_runs(strategy: str, settings: list[dict[str, Any]], folder: Path) -> int:
    """Trainings with a comparison after every step; how many ended."""
    torch.set_num_threads(1)
    done = 0
    for name, train in itertools.product(["digits", "text", "dropping"], settings):
        spec = JobSpec.model_validate(
            {
                "name": name, "task": "t:T", "strategy": strategy, "seed": done,
                "train": {"steps": 5, "global_batch_size": 36, "virtual_shards": 6, **train},
                "checks": {"every_steps": 1},
            }
        )  # fmt: skip
        run = RunDir(folder / f"{done}")
        run.create()
        task = Dropping(n=72) if name == "dropping" else example(name)
        ranks = RankInfo.from_env()
        context = TrainContext(spec, run, ranks, 0, task, torch.device("cpu"))
        result = NativeTrainer(context).run()
        assert result.steps == 5
        done += 1
        if ranks.is_rank_zero:
            found = [line["event"] for line in lines(run.path, "events")]
            assert "replicas_differ" not in found
    return done


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 3), ("exact", 2), ("fsdp", 2)])
def test_no_false_alarms(tmp_path: Path, strategy: str, world_size: int) -> None:
    settings = SETTINGS if strategy == "ddp" else SETTINGS[:3]
    done = run_ranks(clean_runs, world_size, strategy, settings, tmp_path, timeout=240)
    assert done == [3 * len(settings)] * world_size


# -- policies --------------------------------------------------------------------------------


def trained(folder: Path, kind: type[Task], checks: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    spec = JobSpec.model_validate(
        {
            "name": "t", "task": "t:T", "strategy": "ddp",
            "train": {"steps": STEPS, "global_batch_size": 48},
            "checkpoint": {"every_steps": 2},
            "checks": {"every_steps": 1, **checks},
        }
    )  # fmt: skip
    run = RunDir(folder)
    run.create()
    context = TrainContext(spec, run, RankInfo.from_env(), 0, kind(), torch.device("cpu"))
    try:
        return NativeTrainer(context).run()
    except (ReplicaError, NonFiniteError) as error:
        return format_error(error)


FLIP = "kind=flip-parameter-bit,rank=1,step=5,param=first.weight,bit=20"
SPOIL = "kind=nan-loss,rank=1,step=5"


def test_warned_of_a_mismatch_training_goes_on(tmp_path: Path) -> None:
    checks = {"on_mismatch": "warn", "inject": [FLIP]}
    results = run_ranks(trained, 3, tmp_path, Talkative, checks)
    assert all(isinstance(each, TrainResult) for each in results)
    (event,) = [e for e in lines(tmp_path, "events") if e["event"] == "replicas_differ"]
    assert (event["step"], event["agreed"], event["ranks"]) == (6, 5, [1])
    assert event["kinds"] == ["parameters"]


def test_rolled_back_the_training_is_the_unbroken_one(tmp_path: Path) -> None:
    sound = run_ranks(trained, 3, tmp_path / "sound", Talkative, {})
    checks = {"on_mismatch": "rollback", "inject": [FLIP]}
    rolled = run_ranks(trained, 3, tmp_path / "rolled", Talkative, checks)
    assert {each.parameters_sha256 for each in rolled} == {sound[0].parameters_sha256}
    resumed = [e["step"] for e in lines(tmp_path / "rolled", "events") if e["event"] == "resumed"]
    assert resumed == [4]


def test_rolling_back_ends(tmp_path: Path) -> None:
    checks = {"on_mismatch": "rollback", "max_rollbacks": 2}
    results = run_ranks(trained, 2, tmp_path, Drifting, checks)
    assert all("ranks 0 and 1 differ" in each for each in results)
    events_ = [e["event"] for e in lines(tmp_path, "events")]
    assert events_.count("replicas_differ") == 3


class Drifting(Talkative):
    """Rank 1 changes a parameter by itself in step 4, however often it is tried."""

    def __init__(self) -> None:
        self.calls = 0

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        steps = itertools.count(1)

        def drift(*_: Any) -> None:
            if next(steps) == 4 and dist.get_rank() == 1:
                with torch.no_grad():
                    model.first.bias += 1e-3

        optimizer.register_step_post_hook(drift)
        return optimizer


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_of_nan_is_skipped_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    checks = {"on_nan": "skip", "inject": [f"kind=nan-loss,rank={world_size - 1},step=5"]}
    results = run_ranks(trained, world_size, tmp_path, Talkative, checks)
    assert all(isinstance(each, TrainResult) for each in results)
    assert len({each.parameters_sha256 for each in results}) == 1
    (event,) = [e for e in lines(tmp_path, "events") if e["event"] == "step_skipped"]
    assert event["step"] == 5


def test_skipping_is_bounded(tmp_path: Path) -> None:
    checks = {"on_nan": "skip", "max_skipped": 2}
    results = run_ranks(trained, 2, tmp_path, Hopeless, checks)
    for text in results:
        assert_shown(text, "check.too-many-skipped", "2 steps", "checks.max_skipped")


class Hopeless(Talkative):
    """NaN from the third loss on, on rank 1."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += 1
        loss = super().loss(model, batch)
        return loss * float("nan") if self.calls >= 3 and dist.get_rank() == 1 else loss


def test_after_a_warning_of_nan_training_continues(tmp_path: Path) -> None:
    results = run_ranks(trained, 2, tmp_path, Talkative, {"on_nan": "warn", "inject": [SPOIL]})
    assert all(isinstance(each, TrainResult) for each in results)


class Poisoned(Talkative):
    """Sample 77 has an infinite target."""

    def train_dataset(self) -> Any:
        dataset = super().train_dataset()
        dataset.tensors[1][77] = float("inf")
        return dataset

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model.last(torch.tanh(model.first(x))) - y).square().mean()


def test_the_sample_is_named(tmp_path: Path) -> None:
    results = run_ranks(trained, 2, tmp_path, Poisoned, {})
    assert all("[check.not-finite]" in each for each in results)
    assert sum("sample 77 " in each for each in results) == 1


# -- parameters without a gradient -----------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "exact", "fsdp"])
def test_unused_parameters_are_named_after_a_step_and_an_epoch(
    tmp_path: Path, strategy: str
) -> None:
    spec = job(strategy, {"n": 32, "spare": "never"}, train={"steps": 5, "global_batch_size": 8})
    run_ranks(train_regression, 2, spec, tmp_path)
    told = [e for e in lines(tmp_path, "events") if e["event"] == "unused_parameters"]
    assert [(e["step"], e["over"]) for e in told] == [(1, "step"), (4, "epoch")]
    assert told[0]["parameters"] == ["spare.weight", "spare.bias"]


# -- before the first step -------------------------------------------------------------------


class Differing(Talkative):
    """Something is another on rank 1."""

    what = ""

    def model(self) -> nn.Module:
        model = super().model()
        if dist.get_rank() != 1:
            return model
        if self.what == "frozen":
            model.norm.weight.requires_grad_(False)
        if self.what == "order":
            model.first, model.last, first = model.first, model.last, model.first
            del model.first
            model.first = first
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        odd = dist.get_rank() == 1
        if self.what == "kind" and odd:
            return torch.optim.SGD(model.parameters(), lr=0.01)
        decay = 0.1 if self.what == "decay" and odd else 0.01
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)


class Frozen(Differing):
    what = "frozen"


class Reordered(Differing):
    what = "order"


class OtherKind(Differing):
    what = "kind"


class OtherDecay(Differing):
    what = "decay"


def surroundings(folder: Path) -> str:
    """Rank 1 has another file of the same task, whose class is not dtrain's."""
    file = folder / str(dist.get_rank()) / "written_here.py"
    file.parent.mkdir()
    methods = ("model", "train_dataset", "loss", "optimizer")
    body = "".join(f"    def {name}(self, *_): ...\n" for name in methods)
    file.write_text(f"class Written:\n{body}" + "# edited\n" * (dist.get_rank() == 1))
    try:
        compare_surroundings(load_task("written_here.py:Written", {}, file.parent), seed=0)
    except ReplicaError as error:
        return f"{error.culprits} {format_error(error)}"
    return ""


def test_other_code_on_a_rank_is_named(tmp_path: Path) -> None:
    for text in run_ranks(surroundings, 3, tmp_path):
        assert text.startswith("[1] "), text
        assert_shown(text, "check.programs-differ", "the task's code ")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Frozen, "norm.weight is (16,) torch.float32, number 2 on rank 1"),
        (Reordered, "number 4 on rank 1"),
        (OtherKind, "kind is SGD on rank 1 and AdamW on rank 0"),
        (OtherDecay, "weight_decay of group 0 is 0.1 on rank 1 and 0.01 on rank 0"),
    ],
)
def test_what_differs_before_training_is_named(
    tmp_path: Path, kind: type[Task], message: str
) -> None:
    results = run_ranks(trained, 3, tmp_path, kind, {})
    assert all(message in each for each in results), results


# -- a loop of one's own ---------------------------------------------------------------------


def own_loop(fault: str) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(6):
        if fault == "parameter" and step == 3 and dist.get_rank() == 2:
            with torch.no_grad():
                model[2].weight[0, 5] += 1e-3
        optimizer.zero_grad()
        torch.manual_seed(10 * step + dist.get_rank())
        wrapped(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        try:
            package.check(wrapped, optimizer, every=2)
        except ReplicaError as error:
            return f"{step} {error.culprits} {format_error(error)}"
    return "sound"


def test_check_in_a_loop_of_ones_own() -> None:
    assert run_ranks(own_loop, 3, "") == ["sound"] * 3
    results = run_ranks(own_loop, 3, "parameter")
    for text in results:
        assert text.startswith("3 [2] "), text
        assert_shown(text, "check.replicas-differ", "call 2 ", "parameters: 2.weight[0, 5] is")


def test_check_costs_nothing_in_one_process() -> None:
    package.check(nn.Linear(2, 2))


# -- launched --------------------------------------------------------------------------------


def test_an_injected_fault_ends_in_a_verdict(tmp_path: Path) -> None:
    done = dtrain(
        "launch", "--nodes", "3", "--procs", "1", "--set", "checks.every_steps=2",
        "--inject", "rank=1,step=5,kind=flip-parameter-bit,param=weight,element=2,bit=20", TINY,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    block = done.stdout[done.stdout.index("FAILED") :].splitlines()
    assert block[0].startswith("FAILED: rank 1 on node 1 (")
    assert " raised ReplicaError  [check.replicas-differ]" in block[0]
    assert_named(block[1], ["step 4 ", "step 6"])
    assert "rank 1 " in block[2]
    assert "parameters: weight[0, 2] is" in block[3]
    assert "Traceback" not in done.stdout + done.stderr
    why = dtrain("why", cwd=tmp_path)
    assert why.stdout.splitlines()[:4] == block[:4]
    again = dtrain("resume", cwd=tmp_path)
    assert again.returncode == 0, "a fault on purpose is made in the first attempt only"


@pytest.mark.parametrize(
    ("fault", "code", "name"),
    [
        ("rank=1,kind=flip-parameter-bitt", "job.invalid-value", "'flip-parameter-bit'?"),
        ("rank=1", "job.invalid-value", "kind missing"),
        ("rank=2,kind=lr", "plan.absent-rank", "--inject: lr on rank 2: "),
        ("rank=1,kind=lr,step=999", "job.fault-after-the-end", "lr in step 999: "),
    ],
)
def test_a_fault_that_cannot_be_meant_is_refused_before_anything_starts(
    tmp_path: Path, fault: str, code: str, name: str
) -> None:
    done = dtrain("launch", "--procs", "2", "--inject", fault, TINY, cwd=tmp_path)
    assert done.returncode == 2
    assert_shown(done.stderr, code, name)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("strategy", "world_size", "culprit"),
    [("ddp", 2, 1), ("ddp", 3, 0), ("ddp", 4, 3), ("exact", 4, 0), ("fsdp", 3, 2)],
)
def test_a_left_out_collective_ends_in_a_verdict(
    tmp_path: Path, strategy: str, world_size: int, culprit: int
) -> None:
    job_file = JOBS / "talkative" / "job.yaml"
    done = dtrain(
        "launch", "--procs", str(world_size), "--strategy", strategy,
        "--set", "launch.collective_timeout=5s",
        "--inject", f"rank={culprit},step=5,kind=skip-collective", job_file,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    head, *calls = done.stdout[done.stdout.index("FAILED") :].splitlines()[:3]
    places = re.findall(r"all_reduce\(float32\[\]\) at talkative/task\.py:(\d+)", "\n".join(calls))
    if world_size == 2:
        assert head.startswith("FAILED: rank 1 on node 0 (")
        assert ") and rank 0 called different collectives; " in head
        assert [call.split()[2] for call in calls] == ["1", "0"]
        assert sorted(places) == ["28", "29"]
    else:
        assert "its collectives differ from the other ranks'" in head
        assert head.startswith(f"FAILED: rank {culprit} on node 0 (")
        assert places == ["29", "28"]


def test_the_exchange_does_not_grow() -> None:
    sizes = [run_ranks(exchanged, world_size) for world_size in (2, 4, 8)]
    assert {size for each in sizes for size in each} == {112}


def exchanged() -> int:
    """Bytes of the ledger's all-reduce, of a small model and of a large."""
    from dtrain.train.checks.replicas import Ledger
    from dtrain.train.checks.train_state import TrainState

    seen = []
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for width in (2, 500):
        torch.manual_seed(0)
        ledger = Ledger(TrainState(nn.Linear(width, width)))
        assert ledger.differing(ledger.words()) == []
    dist.all_reduce = plain
    (size,) = set(seen)
    return size
