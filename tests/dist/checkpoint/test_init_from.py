"""`checkpoint.init_from`: a run starts with the weights of another program, or of another run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import lightning_shapes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dtrain import catalog
from dtrain.errors import CheckpointError, JobError, PlanError, UsageError
from dtrain.job.load import load_job
from dtrain.planning import Request, plan_run
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.task import Task
from dtrain.testing import run_ranks
from dtrain.train.checks.replicas import ReplicaError
from dtrain.train.context import TrainContext
from dtrain.train.metrics.events import Events
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.weights.initial import InitialWeights
from support.checkpoints import write_checkpoint
from support.errors import raises
from support.launch import TINY
from support.lightning_fit import SEED, fit
from support.trainings import Outcome, Regression, job, lines, same_end, train

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good


class Tied(nn.Module):
    """Has a tensor with two names, buffers, and one of two bytes."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.small = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.out = nn.Linear(4, 7, bias=False)
        self.head = nn.Linear(4, classes)
        self.out.weight = self.embed.weight


def state_of(model: nn.Module) -> State:
    return {name: each.clone() for name, each in model.state_dict().items()}


def stored() -> State:
    """The weights of a model that was trained, with statistics."""
    torch.manual_seed(11)
    model = Tied()
    model.norm(torch.randn(9, 4))
    return state_of(model)


def load(
    folder: Path, source: Path | str, model: nn.Module | None = None, *, strict: bool = True
) -> tuple[State, dict[str, Any]]:
    """Return the weights that a run of one process starts with, and its report."""
    torch.manual_seed(12)
    model = Tied() if model is None else model
    spec = job(checkpoint={"init_from": str(source), "init_strict": strict})
    run = RunDir(folder / "run")
    run.create()
    context = TrainContext(spec, run, RankInfo(), 0, Task(), torch.device("cpu"))
    pointers = {name: each.data_ptr() for name, each in model.named_parameters()}
    initial = InitialWeights(context)
    initial.load(model)
    initial.tell(Events(run, context.ranks, 0))
    assert pointers == {name: each.data_ptr() for name, each in model.named_parameters()}
    return state_of(model), lines(run.path, "events")[-1]


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


# -- formats -----------------------------------------------------------------------------------


def plain(folder: Path, state: State) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def of_old_torch(folder: Path, state: State) -> Path:
    torch.save(state, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def of_lightning(folder: Path, state: State) -> Path:
    own = {"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {0: {"step": 1.0}}}]}
    torch.save(own, folder / "last.ckpt")
    return folder / "last.ckpt"


def of_tutorial(folder: Path, state: State) -> Path:
    torch.save({"epoch": 3, "model_state_dict": state}, folder / "weights.tar.bin")
    return folder / "weights.tar.bin"


def once_each(state: State) -> State:
    """Without the second name of a tensor, which safetensors cannot hold."""
    return {name: each for name, each in state.items() if name != "out.weight"}


def of_safetensors(folder: Path, state: State) -> Path:
    save_file(once_each(state), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def of_hugging_face(folder: Path, state: State) -> Path:
    place = folder / "whole"
    place.mkdir()
    (place / "config.json").write_text("{}")
    save_file(once_each(state), place / "model.safetensors", metadata={"format": "pt"})
    return place


def in_parts(folder: Path, state: State, suffix: str, save: Callable[[State, Path], Any]) -> Path:
    """As transformers writes a large model, with links to other directories as in its cache."""
    names = list(state)
    place, blobs = folder / "snapshot", folder / "blobs"
    place.mkdir()
    blobs.mkdir()
    stem, ending = suffix.split(".")
    weight_map = {}
    for index, listed in enumerate((names[:3], names[3:]), start=1):
        file = f"{stem}-{index:05d}-of-00002.{ending}"
        save({name: state[name] for name in listed}, blobs / f"blob-{index}.{ending}")
        (place / file).symlink_to(f"../blobs/blob-{index}.{ending}")
        weight_map |= dict.fromkeys(listed, file)
    index_file = place / f"{suffix}.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return place


def of_hugging_face_in_parts(folder: Path, state: State) -> Path:
    return in_parts(folder, once_each(state), "model.safetensors", save_file)


def of_hugging_face_in_old_parts(folder: Path, state: State) -> Path:
    return in_parts(folder, state, "pytorch_model.bin", torch.save)


def by_its_index(folder: Path, state: State) -> Path:
    return of_hugging_face_in_parts(folder, state) / "model.safetensors.index.json"


def of_run(folder: Path, state: State) -> Path:
    of_checkpoint(folder, {name: each + 1 for name, each in state.items()}, step=3)
    of_checkpoint(folder, state, step=20)
    return folder / "runs"


def of_checkpoint(folder: Path, state: State, step: int = 3) -> Path:
    final = RunDir(folder / "runs").checkpoint(step)
    other = {"extras": {"large": torch.zeros(9)}, "optimizer": {"state": {}}}
    write_checkpoint(final, {"model": state, **other}, {"step": step}, {})
    return final


FORMATS: list[Callable[[Path, State], Path]] = [
    plain,
    of_old_torch,
    of_lightning,
    of_tutorial,
    of_safetensors,
    of_hugging_face,
    of_hugging_face_in_parts,
    of_hugging_face_in_old_parts,
    by_its_index,
    of_run,
    of_checkpoint,
]


@pytest.mark.parametrize("write", FORMATS, ids=[each.__name__ for each in FORMATS])
def test_a_format_gives_the_same_bits(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write(tmp_path, stored())
    before = sorted(source.parent.rglob("*"))
    found, event = load(tmp_path, source)
    assert_same(found, stored())
    assert sorted(each for each in source.parent.rglob("*") if "/run/" not in f"{each}/") == before
    assert (event["event"], event["source"]) == ("initialized", str(source))
    assert event["checkpoint"] == {of_run: "step-00000020", of_checkpoint: "step-00000003"}.get(
        write, ""
    )
    size = len(stored())
    assert (event["matched"], event["tensors"]) == (size, size)
    assert not any(event[name] for name in ("missing", "unexpected", "other", "converted"))


def test_a_run_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path / "staging"))
    url = f"file://{tmp_path}/there/source"
    run = RunDir(tmp_path / "here" / "source")
    run.create()
    run.url_file.write_text(url)
    done = train(job(train={"steps": 2}), run.path)
    for source in (url, f"{url}/checkpoints/step-00000002"):
        found, event = load(tmp_path, source, Regression().model())
        assert event["checkpoint"] == "step-00000002"
        for name, value in found.items():
            np.testing.assert_array_equal(value.numpy(), done.parameters[name])
    assert [path for path in (tmp_path / "staging").rglob("*") if path.is_file()] == []
    with raises("checkpoint.init-not-found", f"{url}s", kind=CheckpointError):
        load(tmp_path, f"{url}s")


# -- what fits ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_an_error_or_reported(tmp_path: Path) -> None:
    state = {**stored(), "old.weight": torch.zeros(2)}
    del state["norm.bias"]
    state["small"] = state["small"].float()
    state["norm.num_batches_tracked"] = state["norm.num_batches_tracked"].float()
    source = plain(tmp_path, state)
    names = ("norm.bias", "old.weight", "head.bias (5,) instead of (6,)", "init_strict: false")
    with raises("checkpoint.init-differs", *names, kind=CheckpointError):
        load(tmp_path, source, Tied(6))
    torch.manual_seed(12)
    first = state_of(model := Tied(6))
    found, event = load(tmp_path, source, model, strict=False)
    taken = ["embed.weight", "norm.weight", "norm.running_mean", "norm.running_var", "out.weight"]
    untouched = ["head.weight", "head.bias", "norm.bias", "norm.num_batches_tracked"]
    assert_same({n: found[n] for n in taken}, {n: state[n] for n in taken})
    assert_same({n: found[n] for n in untouched}, {n: first[n] for n in untouched})
    assert torch.equal(found["small"], state["small"].bfloat16())
    assert (event["matched"], event["tensors"]) == (6, 10)
    assert event["missing"] == ["norm.bias"]
    assert event["unexpected"] == ["old.weight"]
    assert [each.split()[0] for each in event["other"]] == [
        "norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    ]
    assert event["converted"] == {"float32 to bfloat16": 1}


@pytest.mark.parametrize("strict", [True, False])
def test_an_error_changes_nothing(strict: bool, tmp_path: Path) -> None:
    torch.manual_seed(12)
    first = state_of(model := Tied())
    other = plain(tmp_path, {"elsewhere": torch.zeros(2)})
    with raises("checkpoint.init-no-match", "embed.weight", "elsewhere", kind=CheckpointError):
        load(tmp_path, other, model, strict=strict)
    assert_same(state_of(model), first)


def test_a_prefix_is_reported(tmp_path: Path) -> None:
    state = {f"model.{name}": each for name, each in once_each(stored()).items()}
    found, event = load(tmp_path, of_lightning(tmp_path, state))
    assert_same(found, stored())
    assert event["prefix"] == "model. removed"
    parts = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    bare = plain(tmp_path, parts["one"].state_dict())
    with raises("checkpoint.init-no-match", "one., two.", kind=CheckpointError):
        load(tmp_path, bare, parts)


# -- what cannot be read -----------------------------------------------------------------------


class Foreign:
    """Stands for hyperparameters of the user's own class."""


def truncated(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2)
    return path


def index(folder: Path, weight_map: Any) -> Path:
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def written(path: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def damaged_run(folder: Path) -> Path:
    checkpoint = of_checkpoint(folder, stored())
    truncated(checkpoint / "rank-00000.safetensors")
    return folder / "runs"


def empty(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "weights.pt")
    return folder / "weights.pt"


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
HOSTILE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)
LINEAR = nn.Linear(1, 1).state_dict()
BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "nothing": (lambda f: f / "none.pt", "init-not-found", "none.pt"),
    "empty": (lambda f: empty(f, "e"), "init-other-format", "no files"),
    "a run without checkpoints": (
        lambda f: empty(f, "r/checkpoints").parent,
        "init-not-found",
        "/r: ",
    ),
    "a damaged run": (damaged_run, "init-none-intact", "step-00000003"),
    "a damaged checkpoint": (
        lambda f: damaged_run(f) / "checkpoints" / "step-00000003",
        "damaged-file",
        "rank-00000.safetensors",
    ),
    "a pipe": (pipe, "init-other-format", "neither"),
    "another suffix": (lambda f: written(f / "w.h5", b"x"), "init-other-format", "w.h5"),
    "no tensors": (lambda f: written(f / "w.pt", {"epoch": 3}), "init-other-format", "'epoch'"),
    "a list": (lambda f: written(f / "w.pt", [1, 2]), "init-other-format", "list"),
    "sparse": (
        lambda f: written(f / "w.pt", {**stored(), "small": torch.ones(3).to_sparse()}),
        "init-other-format",
        "small",
    ),
    "no zip": (lambda f: written(f / "w.pt", b"text"), "init-unreadable", "w.pt"),
    "truncated": (lambda f: truncated(plain(f, stored())), "init-unreadable", "weights.pt"),
    "a class": (
        lambda f: written(f / "w.ckpt", {"state_dict": LINEAR, "hyper_parameters": Foreign()}),
        "init-unsafe",
        "test_init_from.Foreign",
    ),
    "truncated safetensors": (
        lambda f: truncated(of_safetensors(f, stored())),
        "init-unreadable",
        "weights.safetensors",
    ),
    "hostile safetensors": (
        lambda f: written(f / "w.safetensors", HOSTILE),
        "init-unreadable",
        "w.safetensors",
    ),
    "an index elsewhere": (
        lambda f: index(f, {"a": "../weights.safetensors"}),
        "init-bad-index",
        "'../weights.safetensors'",
    ),
    "a missing part": (
        lambda f: index(f, {"a": "model-1.safetensors"}),
        "init-bad-index",
        "model-1.safetensors",
    ),
    "a missing tensor": (
        lambda f: index(of_safetensors(f, stored()).parent, {"a": "weights.safetensors"}),
        "init-bad-index",
        "'a'",
    ),
    "no map": (lambda f: index(f, ["a"]), "init-bad-index", "weight_map"),
    "an odd map": (lambda f: index(f, {"a": 3}), "init-bad-index", "weight_map"),
}


@pytest.mark.parametrize(("make", "code", "name"), BAD.values(), ids=BAD)
def test_what_cannot_be_read(
    make: Callable[[Path], Path], code: str, name: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    with raises(f"checkpoint.{code}", str(source), name, kind=CheckpointError):
        load(tmp_path, source)


def test_a_newer_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    damaged_run(tmp_path)
    of_checkpoint(tmp_path, stored(), step=1)
    found, event = load(tmp_path, tmp_path / "runs")
    assert_same(found, stored())
    assert (event["checkpoint"], list(event["rejected"])) == ("step-00000001", ["step-00000003"])
    assert (tmp_path / "runs/checkpoints/step-00000003").is_dir(), "another run is only read"


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = PathFinder.find_spec
    monkeypatch.setattr(
        catalog, "find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    with raises("plan.missing-package", "dtrain[export]", kind=UsageError):
        load(tmp_path, of_safetensors(tmp_path, stored()))


# -- trainings ---------------------------------------------------------------------------------


class Zeros(Regression):
    """Trains like `Regression` only if it is given those weights."""

    def model(self) -> nn.Module:
        model = super().model()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        return model


class Loads(Regression):
    """Loads the weights itself."""

    source = Path()

    def model(self) -> nn.Module:
        model = super().model()
        model.load_state_dict(torch.load(self.source))
        return model


def trainings(folder: Path) -> list[Outcome]:
    """Train a source, and from it with each strategy, where the task loads it and where it does
    not."""
    source = train(job("fsdp", train={"steps": 3}), folder / "source")
    file = folder / f"{RankInfo.from_env().rank}.pt"
    torch.save({name: torch.tensor(each) for name, each in source.parameters.items()}, file)
    Loads.source = file
    found = []
    for strategy in ("ddp", "fsdp"):
        spec = job(strategy, checkpoint={"init_from": str(folder / "source")})
        found.append(train(spec, folder / strategy, kind=Zeros))
        found.append(train(job(strategy), folder / f"loads-{strategy}", kind=Loads))
    return found


def test_it_trains_like_a_task_that_loads_the_weights(tmp_path: Path) -> None:
    for ddp, loads_ddp, fsdp, loads_fsdp in run_ranks(trainings, 2, tmp_path, timeout=300):
        same_end([ddp], [loads_ddp])
        same_end([fsdp], [loads_fsdp])


def test_a_resume_continues_from_its_own_checkpoint(tmp_path: Path) -> None:
    source = plain(tmp_path, state_of(Regression().model()))
    sections: dict[str, Any] = {"checkpoint": {"init_from": str(source)}}
    unbroken = train(job(**sections), tmp_path / "unbroken", kind=Zeros)
    first = train(job(args={"stop_after": 4}, **sections), tmp_path / "broken", kind=Zeros)
    assert first.result is not None
    assert first.result.stopped == "test"
    source.unlink()
    same_end([train(job(**sections), tmp_path / "broken", kind=Zeros)], [unbroken])
    told = [line["event"] for line in lines(tmp_path / "broken", "events")]
    assert told.count("initialized") == 1


def other_files(folder: Path) -> None:
    """Each rank has a directory of its own at the same path, as hosts have."""
    os.chdir(folder / os.environ["RANK"])
    torch.manual_seed(int(os.environ["RANK"]))
    torch.save(Regression().model().state_dict(), "weights.pt")
    train(job("ddp", checkpoint={"init_from": "weights.pt"}), folder / "run")


def test_hosts_with_other_files_are_found(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    with raises("check.initial-values-differ", "first.weight", "weights.pt", kind=ReplicaError):
        run_ranks(other_files, 2, tmp_path)


KINDS = {"Plain": ("Plain", "Zeros"), "Late": ("LateLayers", "LateZeros")}


def modules(folder: Path, *cases: tuple[str, str, str], **lightning: Any) -> None:
    """Train modules, and others that are given their weights: (module, strategy, step)."""
    for kind, strategy, step in cases:
        place = folder / f"{kind}-{strategy}"
        plain_kind, zero_kind = KINDS[kind]
        sections: dict[str, Any] = {"strategy": strategy, "lightning": {"step": step}}
        own = fit(place / "own", plain_kind, sections)
        seed_everything(derive_seed("model", SEED))
        source = folder / f"{RankInfo.from_env().rank}.ckpt"
        torch.save({"state_dict": first_weights(plain_kind)}, source)
        sections = {"strategy": strategy, "lightning": {"step": step, **lightning}}
        given = {**sections, "checkpoint": {"init_from": str(source)}}
        done = fit(place / "given", zero_kind, given)
        assert_same(done.parameters, own.parameters)
        assert done.told.count("initialized") == 1


def first_weights(name: str) -> State:
    module = getattr(lightning_shapes, name)()
    module.setup("fit")
    module.configure_model()
    return state_of(module)


def test_a_lightning_module_with_the_step_of_dtrain(tmp_path: Path) -> None:
    modules(tmp_path, ("Late", "single", "dtrain"))


def test_a_lightning_module_in_the_loops_of_lightning(tmp_path: Path) -> None:
    validates = {"also_run": ["validate"]}  # before the fit, for which layers are made again
    modules(tmp_path, ("Late", "single", "lightning"), **validates)
    cases = ("Late", "ddp", "lightning"), ("Plain", "fsdp", "lightning")
    run_ranks(modules, 2, tmp_path, *cases, **validates)


# -- jobs --------------------------------------------------------------------------------------


def test_a_path_is_relative_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "job"
    place.mkdir()
    (place / "task.py").write_text((TINY.parent / "task.py").read_text())
    file = place / "job.yaml"
    file.write_text(TINY.read_text() + "checkpoint:\n  init_from: weights.pt\n")
    monkeypatch.chdir(tmp_path)
    with raises("job.data-not-found", "job/job.yaml:10", "job/weights.pt", kind=PlanError):
        plan_run("job/job.yaml", Request())
    plain(place, {})
    planned = plan_run("job/job.yaml", Request())
    assert planned.job.spec.checkpoint.init_from == str(place / "weights.pt")
    url = load_job("job/job.yaml", ["checkpoint.init_from=s3://bucket/runs/one"])
    assert url.spec.checkpoint.init_from == "s3://bucket/runs/one"


def test_a_script_loads_its_weights_itself(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)\n")
    file = tmp_path / "job.yaml"
    file.write_text("name: s\nscript: train.py\ncheckpoint: {init_from: w.pt}\n")
    with raises("job.field-without-effect", "checkpoint", kind=JobError):
        load_job(file)
