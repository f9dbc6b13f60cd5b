"""`dtrain checkpoint`: what each command shows of real checkpoints, does to them, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dtrain.cli.main import main
from dtrain.ranks import RankInfo
from dtrain.run.attempts import Handle
from dtrain.run.remote.mirror import Mirror
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checkpoint import headers
from dtrain.train.checkpoint.content import contribution, read_checkpoint
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.store import CheckpointStore
from support.checkpoints import TENSORS, save, store, write_checkpoint
from support.errors import assert_named, assert_shown
from support.s3 import BUCKET, S3, make_bucket
from support.sharded import Sharded

JOB = """\
name: digits
task: task.py:Digits
train: {steps: 40, global_batch_size: 4}
checkpoint: {keep: 2, best: {metric: accuracy, mode: max, keep: 2}}
"""
ABOUT = {"torch": "2.12.0", "strategy": "ddp", "world_size": 1}


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run `dtrain checkpoint …` in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Done:
        with pytest.raises(SystemExit) as end:
            main(["checkpoint", *map(str, arguments)])
        shown = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Done(end.value.code, shown.out, shown.err)

    return run


def make_run(folder: Path, job: str = JOB) -> RunDir:
    run = RunDir(folder / "digits-abc234")
    run.create()
    run.resolved.write_text(job)
    return run


def model(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((9, 4), float(step)), "b": torch.arange(5)}


def train(run: RunDir, *steps: int, retention: Retention | None = None) -> CheckpointStore:
    """Save checkpoints as a training does; an accuracy of 0.5 belongs to step 10."""
    checkpoints = CheckpointStore(run, RankInfo(), retention or Retention(9))
    for step in steps:
        state = {"model": model(step), "optimizer": {"state": {}, "groups": [{"lr": 1 / step}]}}
        progress = {"step": step, "epoch": 0, "consumed": 4 * step}
        content = contribution(state, {"extras": {"random": [1]}}, progress, 0, 1)
        saved = checkpoints.save(step, content, {"time": time.time() - 90, **ABOUT})
        assert saved is not None
        if step == 10:
            checkpoints.score(saved.folder, "accuracy", 0.5)
            checkpoints.keep_as(saved.folder, "best")
    return checkpoints


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 10, 20, 30 and 40."""
    run = make_run(tmp_path / "runs")
    train(run, 10, 20, 30, 40)
    line = {"step": 30, "split": "eval", "accuracy": 0.25, "loss": 2.0}
    run.metrics.write_text(json.dumps(line) + "\n")
    return run


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- list and show -------------------------------------------------------------------------


def test_list_says_why_each_is_kept_and_marks_what_is_none(run: RunDir, command: Command) -> None:
    shown = [line.split() for line in command("list").out.splitlines()]
    assert shown[0] == ["STEP", "SIZE", "AGE", "METRIC", "KEPT"]
    assert [line[0] for line in shown[1:]] == ["10", "20", "30", "40", "best"]
    assert [line[4:] for line in shown[1:]] == [
        ["accuracy", "0.5", "best"],
        ["-", "-"],
        ["accuracy", "0.25", "newest"],
        ["-", "newest"],
        ["-", "copy", "of", "step", "10"],
    ]
    shutil.copytree(run.checkpoint(40), run.checkpoints / "step-00000050.rejected")
    (run.checkpoints / ".step-00000060.aside-0123abcd").mkdir()
    flip(run.checkpoint(20) / "manifest.json")
    done = command("list")
    assert done.code == 0
    assert_named(done.err, ["step-00000020: manifest.json is damaged"])
    assert max(map(len, done.out.splitlines())) <= 80
    rows = {row["name"]: row for row in command("list", "digits", "--json").json}
    states = {row["step"]: row["state"] for name, row in rows.items() if name != "best"}
    assert states == {
        10: "complete", 20: "damaged", 30: "complete", 40: "complete", 50: "rejected",
        60: "incomplete",
    }  # fmt: skip
    assert rows["step-00000030"]["metrics"] == {"accuracy": 0.25, "loss": 2.0}
    assert rows["step-00000040"]["about"]["strategy"] == "ddp"
    assert rows["step-00000040"]["bytes"] > 9 * 4 * 4


def test_a_run_without_checkpoints(tmp_path: Path, command: Command) -> None:
    make_run(tmp_path / "runs")
    assert command("list").code == 0
    (tmp_path / "runs" / "digits-abc234" / "checkpoints").rmdir()
    assert command("list", "--json").json == []
    assert_shown(command("show").err, "checkpoint.none-saved", "digits-abc234")


def test_show_what_is_in_it(run: RunDir, command: Command) -> None:
    done = command("show", "digits:20", "--tensors")
    assert done.code == 0
    assert_named(done.out, ["80 samples", "2.12.0", "ddp", TENSORS, "float32", "[9, 4]", "0:01:30"])
    facts = command("show", run.checkpoint(40), "--tensors", "--json").json
    assert (facts["name"], facts["step"]) == ("digits-abc234:40", 40)
    assert facts["trees"] == {"model": {"tensors": 2, "bytes": 9 * 4 * 4 + 5 * 8}}
    assert {each["name"]: each["shape"] for each in facts["tensors"]} == {
        "model/w": [9, 4],
        "model/b": [5],
    }


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["show", "digits:50"], "checkpoint.not-found", "10, 20, 30, 40, best"),
        (["show", "digits:newest"], "checkpoint.not-found", "'newest'"),
        (["show", "digits:"], "checkpoint.not-found", "''"),
        (["show", "nix:10"], "run.not-found", "'nix'"),
        (["list", "nix"], "run.not-found", "'nix'"),
        (["diff", "digits:10"], "usage.missing-argument", "OTHER"),
        (["export", "digits:10"], "usage.missing-argument", "--to"),
        (["export", "--to", "onnx"], "usage.invalid-value", "onnx"),
        (["export", "--to", "torch", "-o", "nix/x.pt"], "export.no-directory", "nix"),
        (["export", "--to", "torch", "-o", "runs"], "export.file-exists", "runs"),
        (["prune", "--keep", "0"], "usage.invalid-value", "--keep"),
        (["pin", "digits:best"], "checkpoint.not-of-a-step", "best"),
        (["lst"], "usage.unknown-command", "'list'"),
        (["rm"], "usage.unknown-command", "'prune'"),
    ],
)
def test_a_mistake(
    run: RunDir, command: Command, arguments: list[str], code: str, name: str
) -> None:
    before = names(run)
    done = command(*arguments)
    assert done.code == 2
    assert_shown(done.err, code, name)
    assert names(run) == before


# -- verify --------------------------------------------------------------------------------


def test_verify_names_what_is_damaged(
    run: RunDir, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("verify")
    assert done.code == 0
    assert done.out.count(": intact, ") == 5
    big = {"w": torch.zeros(3 << 20)}
    save(store(run, 9), 50, big)
    flip(run.checkpoint(50) / TENSORS, 5 << 20)
    flip(run.checkpoint(50) / TENSORS, 9 << 20)
    os.truncate(run.checkpoint(40) / TENSORS, 100)
    (run.checkpoint(30) / "state.json").unlink()
    shutil.copytree(run.checkpoint(20), run.checkpoint(60))
    done = command("verify", "digits", "--json")
    assert done.code == 1
    found = {each["name"].partition(":")[2]: each for each in done.json}
    assert {name: each["intact"] for name, each in found.items()} == {
        "60": False, "50": False, "40": False, "30": False, "20": True, "10": True, "best": True,
    }  # fmt: skip
    damage = {name: [(d["code"], d["message"]) for d in e["damage"]] for name, e in found.items()}
    assert [code for code, _ in damage["50"]] == ["checkpoint.damaged-file"] * 2
    for (_, message), first in zip(damage["50"], (4 << 20, 8 << 20), strict=True):
        assert_named(message, [TENSORS, f"bytes {first} to "])
    assert [damage[name][0][0] for name in ("60", "40", "30")] == [
        "checkpoint.wrong-directory",
        "checkpoint.damaged-file",
        "checkpoint.missing-file",
    ]
    done = command("verify", "digits:20", run.checkpoint(30))
    assert done.code == 1
    assert_shown(done.out, "checkpoint.missing-file", "state.json", "digits-abc234:20: intact")


# -- diff ----------------------------------------------------------------------------------


def test_diff_by_how_much(tmp_path: Path, command: Command) -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.arange(12.0).view(3, 4)
    one = {
        "same": rows,
        "float": torch.tensor([1.0, 2.0, nan, inf, 0.0]),
        "bfloat16": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "integer": torch.tensor([2**62, 5]),
        "complex": torch.tensor([1 + 1j, 2]),
        "shape": rows,
        "kind": rows,
        "mine": rows,
    }
    other = {
        **one,
        "float": torch.tensor([1.0, 2.5, 1.0, inf, -0.0]),
        "bfloat16": torch.tensor([1.0, 4.0], dtype=torch.bfloat16),
        "integer": torch.tensor([2**62 + 1, 5]),
        "complex": torch.tensor([1 - 1j, 2]),
        "shape": rows.T.contiguous(),
        "kind": rows.half(),
    }
    other["theirs"] = other.pop("mine")
    for name, each, rate in (("one", one, 0.1), ("other", other, 0.2)):
        state = {"model": each, "optimizer": {"groups": [{"lr": rate, "eps": 1}]}}
        write_checkpoint(tmp_path / name, state, {"step": 1}, {})
    assert command("diff", "one", "one").out == "the same: 8 tensors\n"
    done = command("diff", "one", "other", "--json")
    found = done.json
    assert (done.code, found["are_same"], found["same"]) == (1, False, 1)
    assert found["only"] == [["mine"], ["theirs"]]
    assert found["other_kind"] == {
        "shape": ["float32 [3, 4]", "float32 [4, 3]"],
        "kind": ["float32 [3, 4]", "float16 [3, 4]"],
    }
    assert [tuple(each.values()) for each in found["tensors"]] == [
        ("float", 5, 3, None, None, [1, 0]),  # JSON has no infinity
        ("bfloat16", 2, 1, 2.0, 0.5, [0, 0]),
        ("complex", 2, 1, 2.0, pytest.approx(2**0.5), [0, 0]),
        ("integer", 2, 1, 1.0, pytest.approx(2**-62), [0, 0]),
    ]
    assert found["values"] == []
    done = command("diff", "--all", "one", "other")
    assert_named(done.out, ["optimizer/groups/0/lr", "only in", "the same: 1 tensor\n", "inf"])
    assert "eps" not in done.out


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Save a model that is cut over the ranks; return the whole parameters."""
    one = Sharded(2, 10, seed=1)
    one.step()
    one.save(folder)
    found: dict[str, Any] = dict(one.model.named_parameters())
    return {name: each.full_tensor().detach() for name, each in found.items()}


def test_of_three_ranks_and_of_one(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 rows of 3 ranks: the first has 4, and the last 2."""
    monkeypatch.setattr(headers, "_AT_ONCE", 150)  # so that pieces are cut otherwise than chunks
    parameters = run_ranks(sharded, 3, tmp_path / "three")[0]
    three = RunDir(tmp_path / "three").checkpoint(1)
    tensors = command("show", three, "--tensors", "--json").json["tensors"]
    assert {each["parts"] for each in tensors if each["name"].startswith("model/")} == {3}
    assert command("verify", three).code == 0
    write_checkpoint(tmp_path / "one", {"model": parameters}, {"step": 1}, {})
    assert command("diff", three, "one").out == "the same: 4 tensors\n"
    parameters["1.weight"][8, 9] += 1
    write_checkpoint(tmp_path / "changed", {"model": parameters}, {"step": 1}, {})
    (found,) = command("diff", three, "changed", "--json").json["tensors"]
    assert (found["name"], found["elements"], found["different"]) == ("1.weight", 100, 1)
    parameters["1.weight"][8, 9] -= 1
    command("export", three, "--to", "safetensors", "-o", "a.safetensors", "--all")
    written = load_file("a.safetensors")
    assert all(written[f"model/{name}"].equal(each) for name, each in parameters.items())
    state = read_checkpoint(three)[0]["optimizer"]["state"]
    for name, values in state.items():
        assert all(written[f"optimizer/state/{name}/{k}"].equal(v) for k, v in values.items())
    assert len(written) == 4 + 4 * 3


# -- export --------------------------------------------------------------------------------


def test_export_bit_for_bit(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "_AT_ONCE", 64)
    bits = torch.randint(0, 256, (2, 3, 8), dtype=torch.uint8)
    kinds = ["float32", "bfloat16", "float8_e4m3fn", "uint16", "int64", "bool"]
    whole = {kind: bits.view(getattr(torch, kind)) for kind in kinds if kind != "bool"}
    whole |= {"bool": bits > 99, "none": torch.empty(0, 3), "one": torch.tensor(2.5)}
    whole["tied"] = whole["float32"]
    make_run(tmp_path / "runs")
    folder = RunDir(tmp_path / "runs" / "digits-abc234").checkpoint(7)
    write_checkpoint(folder, {"model": whole}, {"step": 7}, {})

    def is_same(found: dict[str, torch.Tensor]) -> None:
        assert found.keys() == whole.keys()
        for name, each in whole.items():
            assert (found[name].dtype, found[name].shape) == (each.dtype, each.shape), name
            view = (found[name].reshape(-1).view(torch.uint8), each.reshape(-1).view(torch.uint8))
            assert torch.equal(*view), name

    done = command("export", "--to", "safetensors")
    assert_named(done.out, ["digits-abc234-7.safetensors", "digits-abc234:7", "9 tensors"])
    is_same(load_file("digits-abc234-7.safetensors"))
    assert command("export", "--to", "torch", "-o", "a b.pt", "--json").json["tensors"] == 9
    for mapped in (False, True):
        found = torch.load("a b.pt", weights_only=True, mmap=mapped)
        is_same(found)
        assert found["tied"].data_ptr() == found["float32"].data_ptr()
    with zipfile.ZipFile("a b.pt") as file:
        assert file.testzip() is None  # other programs compare checksums
    done = command("export", "--to", "torch", "-o", "a b.pt")
    assert_shown(done.err, "export.file-exists", "a b.pt")
    write_checkpoint(folder, {"model": {"c": torch.ones(2, dtype=torch.cfloat)}}, {"step": 7}, {})
    done = command("export", "--to", "safetensors", "-o", "c.safetensors")
    assert_shown(done.err, "export.unsupported-type", "complex64", "c has")
    assert command("export", "--to", "torch", "-o", "a b.pt", "--force").code == 0
    assert torch.load("a b.pt", weights_only=True)["c"].tolist() == [1, 1]
    flip(folder / TENSORS)
    done = command("export", "--to", "torch", "-o", "d")
    assert done.code == 1
    assert_shown(done.err, "checkpoint.damaged-file", TENSORS, "digits-abc234:7")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a b.pt",
        "digits-abc234-7.safetensors",
        "runs",
    ]


def test_export_to_a_full_disk_leaves_nothing(
    tmp_path: Path, command: Command, small_disk: Path
) -> None:
    write_checkpoint(tmp_path / "one", {"model": {"w": torch.ones(1 << 20)}}, {"step": 1}, {})
    for to in ("safetensors", "torch"):
        done = command("export", "one", "--to", to, "-o", small_disk / "w")
        assert done.code == 1
        assert_shown(done.err, "export.no-space", str(small_disk / "w"))
        assert not list(small_disk.iterdir())


GROWTH = """
import re, sys
from dtrain.cli.main import main
from dtrain.checkpoints import contents, differences, exporting
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
try:
    main(sys.argv[1:])
except SystemExit:
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("other", 2.0)):
        tensors = {"w": torch.full((8, 4 << 20), value)}  # 134 MB
        write_checkpoint(tmp_path / name, {"model": tensors}, {"step": 1}, {})
    for arguments in (
        ["diff", "one", "other"],
        ["export", "one", "--to", "safetensors", "-o", "a"],
    ):
        command = [sys.executable, "-c", GROWTH, "checkpoint", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        growth = int(done.stdout.splitlines()[-1])
        assert 0 < growth < 110_000_000, arguments  # 64 MB of blocks are cached


# -- prune, pin and unpin ------------------------------------------------------------------


def test_prune_keeps_what_the_job_keeps(run: RunDir, command: Command) -> None:
    before = names(run)
    done = command("prune", "--dry-run", "--json").json
    assert done["kept"].keys() == {"step-00000010", "step-00000030", "step-00000040"}
    assert (list(done["removed"]), names(run)) == (["step-00000020"], before)
    done = command("prune")
    assert done.code == 0
    assert_named(done.out, ["step-00000020 removed", "step-00000010 stays: best"])
    assert names(run) == [each for each in before if each != "step-00000020"]
    command("pin", "digits:30")
    freed = command("prune", "--keep", "1", "--json").json["removed"]
    assert freed == {}
    command("unpin", "digits:30")
    freed = command("prune", "--keep", "1", "--json").json["removed"]
    assert list(freed) == ["step-00000030"]
    assert freed["step-00000030"] > 9 * 4 * 4
    assert names(run) == ["best", "step-00000010", "step-00000040"]


def test_prune_never_removes_the_last_intact_one(run: RunDir, command: Command) -> None:
    for step in (10, 30, 40):
        flip(run.checkpoint(step) / TENSORS)
    done = command("prune")
    assert_named(done.out, ["step-00000040 stays: newest, but damaged: ", "0 checkpoints removed"])
    assert command("prune", "--json").json["kept"]["step-00000020"] == "the newest intact one"
    flip(run.checkpoint(20) / TENSORS)
    before = names(run)
    done = command("prune", "--keep", "1")
    assert done.code == 1
    assert_shown(done.err, "checkpoint.none-intact", "digits-abc234")
    assert names(run) == before


def test_prune_refuses_a_run_that_is_running(run: RunDir, command: Command) -> None:
    Handle.of_this_process("local", 0).write(run)
    before = names(run)
    assert_shown(command("prune", "--keep", "1").err, "run.held", "digits-abc234")
    assert names(run) == before


def test_prune_does_not_know_what_a_script_keeps(tmp_path: Path, command: Command) -> None:
    run = make_run(tmp_path / "runs", "name: digits\nscript: train.py\nstrategy: ddp\n")
    train(run, 10, 20, 30)
    assert_shown(command("prune").err, "checkpoint.keep-unknown", "--keep")
    assert command("prune", "--keep", "1").code == 0
    assert names(run) == ["best", "step-00000030"]
    assert [row["kept"] for row in command("list", "--json").json] == [None, None]


def test_a_pinned_one_survives_the_training(run: RunDir, command: Command) -> None:
    assert_named(command("pin", "digits:20").out, ["digits-abc234:20"])
    keeping = Retention(1)
    train(run, 50, retention=keeping)
    assert names(run) == ["best", "step-00000020", "step-00000050"]
    rows = {row["name"]: row for row in command("list", "--json").json}
    assert (rows["step-00000020"]["pinned"], rows["step-00000020"]["kept"]) == (True, "pinned")
    command("unpin", run.checkpoint(20))
    train(run, 60, retention=keeping)
    assert names(run) == ["best", "step-00000060"]


# -- at a URL ------------------------------------------------------------------------------


def make_remote_run(url: str, folder: Path) -> RunDir:
    run = make_run(folder)
    run.url_file.write_text(f"{url}/{run.id}")
    Mirror(run, f"{url}/{run.id}").push()
    train(run, 10, 20, 30, 40)
    return run


def test_at_a_url(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = tmp_path / "staging"
    monkeypatch.setenv("DTRAIN_STAGING", str(staging))
    url = f"file://{tmp_path}/there"
    make_remote_run(url, tmp_path / "host")
    monkeypatch.setenv("DTRAIN_RUNS", url)
    there = tmp_path / "there" / "digits-abc234" / "checkpoints"
    shutil.copytree(there / "step-00000040", there / "step-00000050")
    (there / "step-00000050" / "manifest.json").rename(
        there / "step-00000050" / "manifest.rejected.json"
    )
    (there / "step-00000060" / "0123abcd").mkdir(parents=True)
    (there / "step-00000060" / "0123abcd" / TENSORS).touch()
    rows = {row["name"]: row for row in command("list", "--json").json}
    assert [rows[f"step-000000{step}"]["kept"] for step in (10, 20, 30, 40)] == [
        "best", None, "newest", "newest",
    ]  # fmt: skip
    assert (rows["best"]["step"], rows["step-00000050.rejected"]["state"]) == (10, "rejected")
    assert not list(staging.rglob(TENSORS))  # nothing large came here
    assert command("show", "last:20", "--json").json["step"] == 20
    (file,) = there.glob(f"step-00000020/*/{TENSORS}")
    flip(file)
    done = command("verify", "last:20")  # not the copy that is here
    assert done.code == 1
    assert_shown(done.out, "checkpoint.damaged-file", TENSORS)
    assert not list(staging.rglob(".verify-*"))
    assert command("diff", "last:30", "last:40").code == 1
    assert command("export", "last:best", "--to", "safetensors", "-o", "w").code == 0
    assert load_file("w")["w"].equal(model(10)["w"])
    command("pin", "last:20")
    assert (there / "step-00000020" / "pinned.json").is_file()
    command("unpin", "last:20")
    done = command("prune", "--keep", "1")
    assert_named(done.out, ["step-00000020 removed", "step-00000030 removed"])
    assert not list(there.glob("step-000000[23]0/**/*.*"))
    assert command("verify").code == 0


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with S3(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path / "staging"))
        make_bucket()
        yield f"s3://{BUCKET}/runs"


def test_on_a_server_that_speaks_s3(tmp_path: Path, command: Command, s3: str) -> None:
    make_remote_run(s3, tmp_path / "host")
    command("pin", "last:20", "--runs", s3)
    rows = command("list", "--runs", s3, "--json").json
    assert [(row["name"], row["kept"]) for row in rows] == [
        ("step-00000010", "best"),
        ("step-00000020", "pinned"),
        ("step-00000030", "newest"),
        ("step-00000040", "newest"),
        ("best", None),
    ]
    done = command("prune", "--runs", s3, "--keep", "1", "--json").json
    assert list(done["removed"]) == ["step-00000030"]
    assert all(each["intact"] for each in done["verified"].values())
    assert command("verify", "--runs", s3, "last:40").code == 0
