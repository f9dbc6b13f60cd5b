"""`dtrain verify` without running anything: recordings written and read, distances, reports."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.cli.main import main
from dtrain.job.spec import JobSpec, TrainSpec
from dtrain.launchers.local import LocalLauncher
from dtrain.run.files import append_line
from dtrain.run.rundir import RunDir
from dtrain.trace import RankLine, Recording, StepRecord, Tensors, TraceOptions, Writer, read
from dtrain.train.data.placement import GlobalBatch
from dtrain.train.tracing import digest, perturb
from dtrain.verification import html, text, warm_servers
from dtrain.verification.compare import L2, Comparison, compare
from dtrain.verification.findings import exact_findings
from dtrain.verification.judge import Result
from dtrain.verification.layouts import (
    REFERENCE,
    Layout,
    accumulating,
    all_layouts,
    reachable_clusters,
    requested_layouts,
    with_extra_layouts,
)
from dtrain.verification.lengths import epoch_samples
from dtrain.verification.report import Report
from dtrain.verification.rules import DATA, ENDED_EARLY, Finding
from dtrain.verification.session import Progress, Session
from support import ROOT
from support.browser import hover, opened
from support.errors import assert_shown, raises

TINY = ROOT / "tests" / "jobs" / "tiny" / "job.yaml"

# -- recordings ------------------------------------------------------------------------------


def tensors(**values: Any) -> Tensors:
    made = Tensors()
    for name, value in values.items():
        tensor = torch.as_tensor(value, dtype=torch.float64)
        made.vectors[name] = digest.as_vector(name, tensor)
        made.digests[name] = digest.of_tensors([tensor])
        made.norms[name] = digest.norm_of(tensor)
    return made


def step(number: int, scale: float = 1.0, **changes: Any) -> StepRecord:
    record = StepRecord(
        step=number,
        loss=2.0 / (number + 1),
        grad_norm=None,
        gradients=tensors(a=[scale, 2.0 * scale], b=[[3.0 * scale]]),
        parameters=tensors(a=[1.0, 1.0], b=[[float(number)]]),
        buffers=Tensors(),
    )
    return replace(record, **changes)


def line(number: int, ids: list[list[int]], **changes: Any) -> RankLine:
    made = RankLine(
        step=number, epoch=0, ids=ids, contents=[[] for _ in ids], losses=[(1.0, 2.0)],
        stepped=1, parameters="p", buffers={}, lr=[0.1], gradients="g", state={}, draws=[],
        random="r", drew=False,
    )  # fmt: skip
    return replace(made, **changes)


def recording(*ranks: list[list[int]], steps: list[StepRecord] | None = None) -> Recording:
    """One epoch of three steps; `ranks` says what each rank reads in step 1, 2, 3."""
    records = steps or [step(number) for number in range(4)]
    lines = {
        number: {
            rank: [line(number, [ids[number - 1]] if number else [])]
            for rank, ids in enumerate(ranks)
        }
        for number in range(len(records))
    }
    return Recording({record.step: record for record in records}, lines, {"loss": 0.5})


ONE = recording([[1, 2], [3, 4], [5]])


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    writers = [Writer(run.recording, rank) for rank in range(2)]
    for number in range(2):
        writers[0].step(step(number))
        for rank, writer in enumerate(writers):
            writer.line(line(number, [[10 * rank + number]]))
    writers[1].line(line(1, [[99]]))  # the step was done once more, by a second attempt
    append_line(run.metrics, {"time": 0, "step": 1, "epoch": 0, "split": "eval", "loss": 0.25})
    got = read(run)
    assert got.last_step == 1
    assert got.ids(1) == [1, 99]
    assert got.metrics == {"loss": 0.25}
    for name, vector in step(1).gradients.vectors.items():
        np.testing.assert_array_equal(got.steps[1].gradients.vectors[name], vector)
    assert got.steps[1].gradients.digests == step(1).gradients.digests
    assert read(RunDir(tmp_path / "nothing")).steps == {}


def test_options_go_through_the_environment() -> None:
    options = TraceOptions(fp64=True, max_train_samples=7)
    assert TraceOptions.from_env(options.to_env()) == options
    assert TraceOptions.from_env({}) is None


def test_a_sketch_keeps_norms_and_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(300, 700, generator=draw, dtype=torch.float64)
    theirs = ours.clone()
    theirs[17, 5] += 0.25
    sketches = [digest.as_vector("w", each) for each in (ours, theirs)]
    assert len(sketches[0]) == digest.NUM_BUCKETS
    assert np.linalg.norm(sketches[0]) == pytest.approx(float(ours.norm()), rel=0.05)
    assert np.linalg.norm(sketches[1] - sketches[0]) == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_any_type_has_a_digest_a_norm_and_a_vector(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 2, dtype=dtype).t()
    assert digest.norm_of(tensor) == pytest.approx(math.sqrt(6))
    assert np.linalg.norm(digest.as_vector("t", tensor)) == pytest.approx(math.sqrt(6))
    other = tensor.clone()
    other[0, 0] = 0
    assert digest.of_tensors([tensor]) != digest.of_tensors([other])


# -- changes to a model ----------------------------------------------------------------------


def test_dropout_is_found_and_stopped_wherever_it_hides() -> None:
    model = nn.ModuleDict(
        {
            "drop": nn.Dropout(0.5),
            "attention": nn.MultiheadAttention(8, 2, dropout=0.1),
            "recurrent": nn.LSTM(4, 4, num_layers=2, dropout=0.2),
            "none": nn.Dropout(0.0),
        }
    )
    perturb.stop_dropout(model)
    rates = model["drop"].p, model["attention"].dropout, model["recurrent"].dropout
    assert rates == (0.0, 0.0, 0.0)
    ones = torch.ones(100)
    assert torch.equal(model["drop"](ones), ones)


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3))
    assert perturb.batch_norms(model) == ["1"]
    perturb.freeze_batch_norm(model)
    model.train()
    model[1](torch.randn(8, 3))
    assert not model[1].training
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert model[0].training


def test_the_first_samples_only() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(10))
    cut = perturb.first_samples(data, 4)
    assert type(cut) is torch.utils.data.TensorDataset
    assert len(cut) == 4
    assert len(perturb.first_samples(list(range(10)), 3)) == 3
    assert perturb.first_samples(data, 10) is data
    assert perturb.first_samples(data, None) is data
    stream = iter(range(3))
    assert perturb.first_samples(stream, 1) is stream


def test_a_batch_in_double_keeps_its_containers() -> None:
    batch = {"x": torch.ones(2), "ids": [torch.ones(2, dtype=torch.int64), "name"]}
    made = perturb.to_double(batch)
    assert made["x"].dtype == torch.float64
    assert made["ids"][0].dtype == torch.int64
    assert made["ids"][1] == "name"


# -- distances and findings ------------------------------------------------------------------


def test_equal_recordings_are_identical() -> None:
    comparison = compare(ONE, recording([[1], [3], [5]], [[2], [4], []]))
    assert comparison.identical
    assert comparison.excess(L2) is None
    assert comparison.first is None
    assert comparison.largest.value == 0


def test_the_first_excess_in_the_order_of_a_step() -> None:
    steps = [step(0), step(1, scale=1 + 1e-6), step(2, scale=1.5), step(3)]
    comparison = compare(ONE, recording([[1, 2], [3, 4], [5]], steps=steps))
    excess = comparison.excess(L2)
    assert excess is not None
    assert (excess.step, excess.what, excess.tensor) == (2, "gradients", "b")
    assert excess.value == pytest.approx(0.5)
    assert comparison.first is not None
    assert comparison.first.step == 1
    assert not comparison.identical or comparison.steps[0].parameters.relative == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_far(bad: float) -> None:
    steps = [step(0), step(1, scale=bad), step(2), step(3)]
    comparison = compare(ONE, recording([[1, 2], [3, 4], [5]], steps=steps))
    excess = comparison.excess(L2)
    assert excess is not None
    assert excess.value == math.inf


def test_a_tensor_that_only_one_side_has() -> None:
    steps = [step(0), step(1, gradients=tensors(a=[1.0, 2.0])), step(2), step(3)]
    excess = compare(ONE, recording([[1, 2], [3, 4], [5]], steps=steps)).excess(L2)
    assert excess is not None
    assert (excess.value, excess.tensor) == (math.inf, "b")


def first_finding(other: Recording, layout: Layout) -> Finding:
    return next(exact_findings(ONE, other, layout))


@pytest.mark.parametrize(
    ("ranks", "step_number", "cause"),
    [
        ([[[1], [3], [5]], [[2], [4], [5]]], 3, "padded"),
        ([[[1], [3], []], [[2], [4], []]], 3, "drop"),
        ([[[1, 2], [3, 4], [5]], [[1, 2], [3, 4], [5]]], 1, "not split between"),
        ([[[2], [3], [5]], [[1], [4], []]], 1, "different order"),
        ([[[3], [1], [5]], [[4], [2], []]], 1, "different seed"),
    ],
)
def test_what_is_wrong_with_samples(
    ranks: list[list[list[int]]], step_number: int, cause: str
) -> None:
    finding = first_finding(recording(*ranks), Layout("ddp", procs=2))
    assert (finding.rule, finding.step) == (DATA, step_number)
    assert cause in finding.likely_cause


def test_samples_of_another_step_are_recognised() -> None:
    other = recording([[1], [1], [5]], [[2], [2], []])
    finding = first_finding(other, Layout("ddp", procs=2, resume_after=1))
    assert finding.observation == "the samples of step 1 were read"
    assert "wrong position" in finding.likely_cause


def test_a_run_that_ended_early() -> None:
    other = recording([[1, 2], [3, 4], [5]], steps=[step(0), step(1)])
    assert first_finding(other, Layout("dp", procs=2)).observation == ENDED_EARLY


# -- layouts -----------------------------------------------------------------------------------


def test_everything_that_a_machine_can_run() -> None:
    with Session(TINY, trainers=["native"]) as session:
        names = [layout.name for layout in session.layouts]
        assert REFERENCE not in session.layouts
    assert len(set(names)) == len(names)
    assert {"dp ×2", "ddp ×2", "ddp ×4", "ddp 2 nodes ×2", "ddp ×2 by torchrun"} <= set(names)
    assert {"ddp ×2, micro 4, 2 loaders", "ddp ×2, resumed", "exact ×4"} <= set(names)
    with Session(TINY, trainers=["native"], steps=1) as session:
        assert "ddp ×2, resumed" not in [layout.name for layout in session.layouts]


def test_of_a_lightning_module_one_process_of_lightning_is_the_reference() -> None:
    reference = Layout("single", trainer="lightning")
    names = [layout.name for layout in all_layouts(["lightning"], reference)]
    assert reference.name not in names
    assert {"lightning ddp 2 nodes ×2", "lightning exact"} <= set(names)
    assert "lightning ddp 2 nodes ×2" not in [p.name for p in all_layouts(["lightning"])]
    assert choose(reference=reference, strategies=["single", "fsdp"], procs=[2]) == [
        "lightning own loops single",
        "lightning fsdp ×2",
        "lightning own loops fsdp ×2",
    ]


def test_which_trainer_a_job_is_compared_with(tmp_path: Path) -> None:
    job = ROOT / "examples" / "lightning" / "job.yaml"
    with Session(job, strategies=["ddp"], procs=[2], only=True) as session:
        names = [layout.name for layout in session.layouts]
        assert names == ["lightning ddp ×2", "lightning own loops ddp ×2"]
    with raises("verify.trainer-unsuitable", "LitDigits", "trainer 'native'"):
        Session(job, trainers=["lightning", "native"])
    chosen = {"strategies": ["ddp"], "procs": [2], "only": True}
    with Session(TINY, overrides=["trainer=lightning"], **chosen) as session:
        assert [layout.name for layout in session.layouts] == ["ddp ×2"]


def test_clusters_that_are_known_here_have_a_row_each(tmp_path: Path) -> None:
    names = [layout.name for layout in all_layouts(clusters=["slurm", "ray"])]
    assert {"ddp ×2 by slurm", "ddp ×2 by ray"} <= set(names)
    assert reachable_clusters({"PATH": str(tmp_path)}) == []
    assert reachable_clusters({"PATH": str(tmp_path), "RAY_ADDRESS": "127.0.0.1:6379"}) == ["ray"]
    sinfo = tmp_path / "sinfo"
    for status, found in ((1, []), (0, ["slurm"])):
        sinfo.write_text(f"#!/bin/sh\nexit {status}\n")
        sinfo.chmod(0o755)
        assert reachable_clusters({"PATH": str(tmp_path)}) == found


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (["--html", "/nope/x.html", "job.yaml"], "usage.invalid-value", ["--html", "/nope"]),
        (["--gpus", "2", "job.yaml"], "usage.unexpected-argument", ["--gpus --procs 2"]),
        (["job.yaml", "other.yaml"], "usage.unexpected-argument", ["job.yaml other.yaml"]),
    ],
)
def test_what_verify_cannot_do_is_refused_before_it_trains(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: str, names: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments])
    assert ended.value.code == 2
    assert_shown(capsys.readouterr().err, code, *names)


def choose(**asked: Any) -> list[str]:
    nothing: dict[str, Any] = dict.fromkeys(
        ("trainers", "strategies", "launchers", "nodes", "procs"), ()
    )
    return [layout.name for layout in requested_layouts(**{**nothing, "gpus": False, **asked})]


def test_every_combination_of_what_was_asked_for() -> None:
    assert choose(strategies=["ddp", "dp"], procs=[1, 2], nodes=[1, 2]) == [
        "ddp", "ddp ×2", "ddp 2 nodes ×1", "ddp 2 nodes ×2", "dp", "dp ×2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "code", "names"),
    [
        ({"strategies": ["dpp"]}, "plan.unknown-name", ("strategy 'dpp'",)),
        (
            {"strategies": ["dp"], "nodes": [2]},
            "verify.nothing-to-compare",
            ("strategy 'dp'", "--nodes 1"),
        ),
        ({"strategies": ["single"]}, "verify.nothing-to-compare", ()),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], code: str, names: tuple[str, ...]) -> None:
    with raises(code, *names):
        choose(**asked)


def rows(job: Path = TINY, **asked: Any) -> list[str]:
    with Session(job, **asked) as session:
        return [layout.name for layout in session.layouts]


def test_what_is_chosen_comes_with_what_finds_more() -> None:
    more = ["ddp ×2, micro 4, 2 loaders", "ddp ×2, resumed", "exact ×2"]
    assert rows(strategies=["ddp"], procs=[2]) == ["ddp ×2", *more]
    assert rows(procs=[4, 2], strategies=["exact", "ddp"]) == [
        "exact ×4", "exact ×2", "ddp ×4", "ddp ×2", *more[:2],
    ]  # fmt: skip
    assert rows(trainers=["lightning"], strategies=["fsdp"], procs=[2]) == [
        "lightning fsdp ×2", "lightning fsdp ×2, micro 4, 2 loaders",
        "lightning fsdp ×2, resumed", "lightning exact ×2",
    ]  # fmt: skip
    assert rows(strategies=["ddp"], procs=[2], steps=1)[2:] == ["exact ×2"]
    assert rows(strategies=["ddp"], procs=[2], only=True) == ["ddp ×2"]
    assert rows(only=True) == [
        "dp ×2",
        "ddp ×2",
        "ddp ×4",
        "fsdp ×2",
        "fsdp ×4",
        "exact ×2",
        "exact ×4",
    ]


def test_what_exact_cannot_is_known_beforehand() -> None:
    train = TrainSpec(global_batch_size=16)
    for layout, why in (
        (Layout("ddp", procs=3), "3 processes"),
        (Layout("ddp", procs=2, gpus=True), "on GPUs"),
    ):
        layouts, left_out = with_extra_layouts([layout], train, 5)
        assert [each.strategy for each in layouts] == ["ddp"] * 3
        ((exact, reason),) = left_out.items()
        assert (exact.strategy, exact.procs) == ("exact", layout.procs)
        assert why in reason
    asked_for = [Layout("ddp", procs=3), Layout("exact", procs=3)]
    assert with_extra_layouts(asked_for, train, 5)[1] == {}


@pytest.mark.parametrize(("batch", "micro"), [(64, 11), (16, 4), (12, 3), (8, 2), (6, 1), (2, 1)])
def test_micro_batches_have_two_samples_where_there_are_four(batch: int, micro: int) -> None:
    layout = accumulating(Layout("ddp", procs=2), TrainSpec(global_batch_size=batch))
    assert layout.micro_batch_size == micro


# -- how long epochs are ---------------------------------------------------------------------

ROWS = [
    REFERENCE,
    Layout("dp", procs=2),
    Layout("ddp", procs=2),
    Layout("ddp", procs=4),
    Layout("exact", procs=2),
]


def forward_passes(start: int, stop: int, layout: Layout, spec: JobSpec) -> list[int]:
    """How many samples each has, as the trainer places them."""
    batch = GlobalBatch(0, 0, start, stop)
    parts = spec.train.virtual_shards if layout.is_exact else layout.world_size
    passes = [
        len(piece)
        for part in range(parts)
        for piece in batch.micro_batches(part, parts, layout.micro_batch_size)
    ]
    cut = layout.parts // layout.world_size
    return [size // cut for size in passes] if layout.strategy == "dp" else passes


@pytest.mark.parametrize("batch", [1, 2, 5, 12, 16, 24, 32, 50, 64, 1000])
def test_no_forward_pass_of_a_short_batch_has_one_sample_alone(batch: int) -> None:
    spec = JobSpec(name="n", task="t", train=TrainSpec(global_batch_size=batch, steps=5))
    layouts = [*ROWS, accumulating(ROWS[2], spec.train)]
    train, evaluated = epoch_samples(spec, layouts)
    assert 2 * batch <= train <= 3 * batch
    assert batch < evaluated <= 2 * batch
    if batch == 1:
        return
    assert train % batch != 0, "there is a short batch"
    for layout in layouts:
        enough = min(2, *forward_passes(0, batch, layout, spec))
        if batch >= 24:
            assert min(forward_passes(2 * batch, train, layout, spec)) >= enough, layout.name
    if batch >= 12:
        assert (train - 2 * batch) % 2, "shares are unequal"


# -- which launches are warm -----------------------------------------------------------------


class FakeServer:
    """Notes what it should import, and starts nothing."""

    made: ClassVar[list[list[str]]] = []
    spawn = None

    def __init__(self, modules: list[str], hash_seed: str) -> None:
        assert hash_seed == "0"
        self.made.append(modules)

    def is_ready(self) -> bool:
        return len(self.made) == 1

    def close(self) -> None:
        self.made.clear()


def test_all_but_the_reference_are_warm_with_a_server_for_each_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warm_servers, "WarmServer", FakeServer)
    with Session(TINY, trainers=["native", "lightning"]) as session:
        plans = {layout.name: session._runner._planned(layout) for layout in session.layouts}
        reference = session._runner._planned(REFERENCE)
    made = warm_servers.WarmServers(reference, plans.values())
    ((imported),) = FakeServer.made
    assert len(set(imported)) == len(imported)
    assert "dtrain.train.strategies.fsdp" in imported
    assert "dtrain.train.loop.native" in imported
    assert not any("lightning" in module for module in imported)
    assert made.launcher(reference) is None
    assert isinstance(made.launcher(plans["ddp ×2"]), LocalLauncher)
    assert made.launcher(plans["ddp ×2 by torchrun"]) is None
    assert made.launcher(replace(plans["ddp ×2"], gpus_per_node=2)) is None
    assert made.launcher(plans["lightning ddp ×2"]) is None, "its server is not ready"
    assert len(FakeServer.made) == 2
    made.close()


# -- reports ---------------------------------------------------------------------------------


def report() -> Report:
    comparison: Comparison = compare(ONE, ONE)
    good = Result(
        Layout("ddp", procs=2),
        "same",
        "L2",
        comparison.largest,
        comparison=comparison,
        recording=ONE,
    )
    finding = Finding(DATA, "samples <3> were read 2 times", "padding & more", 3)
    results = [
        good,
        replace(good, layout=Layout("exact", procs=2), level="L3", bits_of="exact"),
        replace(good, layout=Layout("dp", procs=2), verdict="rounding", level="L1", shrinks=6e8),
        replace(good, layout=Layout("fsdp", procs=2), fixed_noise=True),
        replace(
            good, layout=Layout("ddp", procs=4), verdict="different", level=None, finding=finding
        ),
        Result(Layout("ddp", procs=8), "failed", None, failure="FAILED: rank 7\n  no memory"),
    ]
    return Report("digits", 3, 137, "single", ONE, results)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(width: int) -> None:
    made = report()
    table = text.Table([result.layout for result in made.results], width)
    lines = [table.head(), *(table.row(result) for result in made.results)]
    assert max(map(len, lines)) <= width
    assert lines[1].split() == ["ddp", "×2", "L2", "0", "-", "same"]
    assert lines[2].endswith("same = exact")
    assert lines[3].endswith("rounding")
    assert lines[4].endswith("same, fixed noise")
    assert lines[5].split() == ["ddp", "×4", "-", "0", "step", "3", "DIFFERENT"]
    assert lines[6].endswith("FAILED")
    long = Layout("ddp", procs=2, trainer="lightning", micro_batch_size=11, workers=2)
    table = text.Table([long], width)
    assert len(table.row(replace(made.results[0], layout=long))) <= width


@pytest.mark.parametrize("width", [80, 200])
def test_what_runs_fits_one_line(width: int) -> None:
    long = replace(Layout("ddp", 2), title="a name " * 30).name
    for progress in (Progress(3, 11, long), Progress(3, 11, long, "the reference again in fp64")):
        line = text.waiting(progress, 12.4, width)
        assert len(line) == width - 1
        assert line.startswith("row 3 of 11  a name a name")
        assert line.endswith(f"{progress.again}  12 s")
    assert text.waiting(Progress(0, 11, "single"), 0, width) == "reference  single  0 s"


def test_what_runs_again_is_said() -> None:
    usual = TraceOptions(max_train_samples=7)
    assert usual.beyond(usual) == ""
    assert (
        replace(usual, fp64=True, own_noise=False).beyond(usual)
        == "again in fp64, with fixed noise"
    )
    deep = replace(usual, fp64=True)
    assert deep.beyond(deep) == ""
    assert replace(usual, max_train_samples=9).beyond(usual) == "again"


def test_a_deep_report_says_what_its_levels_mean() -> None:
    deep = replace(report(), deep=True, left_out={"exact": "no", "exact ×2": "no"})
    assert text.opening(deep).startswith("digits: 3 steps in fp64, epochs of 137")
    shown = text.closing(deep, 100)
    assert "L3 same bits in fp64" in shown
    assert "L2" not in shown
    assert "left out: exact, exact ×2 (no)" in shown
    assert deep.to_json()["deep"] is True
    assert deep.to_json()["left_out"][1] == {"layout": "exact ×2", "why": "no"}


def test_what_is_said_below_the_table() -> None:
    shown = text.closing(report(), 80)
    assert "ddp ×4 is a different training from step 3 on" in shown
    assert f"  broken rule   {DATA}" in shown
    assert "  likely cause  padding & more" in shown
    assert "dp ×2 differs only by rounding: in fp64 the difference is 6e+08 times smaller" in shown
    assert "ddp ×8 failed\n  FAILED: rank 7\n    no memory" in shown
    assert shown.endswith("not the same training: 2 of 6 layouts")
    assert max(map(len, shown.splitlines())) <= 80


def test_json_has_everything_and_no_infinity() -> None:
    made = report().to_json()
    assert made["same"] is False
    assert made["reference"]["loss"] == [1.0, 2 / 3, 0.5]
    bad = made["layouts"][4]
    assert bad["finding"]["rule"] == DATA
    assert bad["level"] is None
    assert made["layouts"][1]["same_bits_as"] == "exact"


def test_the_page_is_well_formed_and_stands_alone(tmp_path: Path) -> None:
    html.write(report(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "samples &lt;3&gt; were read 2 times" in page
    assert "src=" not in page
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 7
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
    with opened(tmp_path / "page.html") as shown:
        assert hover(shown, ".plot").split("\n")[0] == "step 2"
    with raises("file.not-writable"):
        html.write(report(), tmp_path / "no" / "page.html")


def test_a_stream_that_shards_itself_has_no_reference() -> None:
    with raises("verify.sharded-stream", "data.stream: sharded"):
        Session(TINY, overrides=["data.stream=sharded"])
