"""`dtrain verify` without running anything: recordings written and read, distances, reports."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from dtrain.cli.verify import command
from dtrain.errors import PlanError, UsageError
from dtrain.recording import RankLine, Recording, StepRecord, Tensors, Wish, Writer, read
from dtrain.rundir import RunDir, append_line
from dtrain.train.observe import adapt, digest
from dtrain.verify import html, svg, text
from dtrain.verify.compare import L2, Comparison, compare
from dtrain.verify.findings import DATA, ENDED_EARLY, Finding, exact_findings
from dtrain.verify.judge import Result
from dtrain.verify.pairs import REFERENCE, Pair, all_pairs, chosen, clusters_here
from dtrain.verify.report import Report
from dtrain.verify.session import Session
from support import ROOT

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
        step=number, epoch=0, ids=ids, losses=[(1.0, 2.0)], stepped=1, parameters="p",
        buffers={}, lr=[0.1], gradients="g", state={}, draws=[], random="r", drew=False,
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


def test_a_wish_goes_through_the_environment() -> None:
    wish = Wish(fp64=True, max_train_samples=7)
    assert Wish.from_env(wish.to_env()) == wish
    assert Wish.from_env({}) is None


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
    adapt.stop_dropout(model)
    rates = model["drop"].p, model["attention"].dropout, model["recurrent"].dropout
    assert rates == (0.0, 0.0, 0.0)
    ones = torch.ones(100)
    assert torch.equal(model["drop"](ones), ones)


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3))
    assert adapt.batch_norms(model) == ["1"]
    adapt.freeze_batch_norm(model)
    model.train()
    model[1](torch.randn(8, 3))
    assert not model[1].training
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert model[0].training


def test_the_first_samples_only() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(10))
    cut = adapt.first_samples(data, 4)
    assert type(cut) is torch.utils.data.TensorDataset
    assert len(cut) == 4
    assert len(adapt.first_samples(list(range(10)), 3)) == 3
    assert adapt.first_samples(data, 10) is data
    assert adapt.first_samples(data, None) is data
    stream = iter(range(3))
    assert adapt.first_samples(stream, 1) is stream


def test_a_batch_in_double_keeps_its_containers() -> None:
    batch = {"x": torch.ones(2), "ids": [torch.ones(2, dtype=torch.int64), "name"]}
    made = adapt.to_double(batch)
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


def first_finding(other: Recording, pair: Pair) -> Finding:
    return next(exact_findings(ONE, other, pair))


@pytest.mark.parametrize(
    ("ranks", "step_number", "cause"),
    [
        ([[[1], [3], [5]], [[2], [4], [5]]], 3, "padded"),
        ([[[1], [3], []], [[2], [4], []]], 3, "drop"),
        ([[[1, 2], [3, 4], [5]], [[1, 2], [3, 4], [5]]], 1, "not shared out"),
        ([[[2], [3], [5]], [[1], [4], []]], 1, "another order"),
        ([[[3], [1], [5]], [[4], [2], []]], 1, "another seed"),
    ],
)
def test_what_is_wrong_with_samples(
    ranks: list[list[list[int]]], step_number: int, cause: str
) -> None:
    finding = first_finding(recording(*ranks), Pair("ddp", procs=2))
    assert (finding.clause, finding.step) == (DATA, step_number)
    assert cause in finding.likely


def test_samples_of_another_step_are_recognised() -> None:
    other = recording([[1], [1], [5]], [[2], [2], []])
    finding = first_finding(other, Pair("ddp", procs=2, resume_after=1))
    assert finding.found == "the samples of step 1 were read"
    assert "wrong position" in finding.likely


def test_a_run_that_ended_early() -> None:
    other = recording([[1, 2], [3, 4], [5]], steps=[step(0), step(1)])
    assert first_finding(other, Pair("dp", procs=2)).found == ENDED_EARLY


# -- pairs -----------------------------------------------------------------------------------


def test_everything_that_a_machine_can_run() -> None:
    pairs = all_pairs(64, 5, ["native"])
    names = [pair.name for pair in pairs]
    assert REFERENCE not in pairs
    assert len(set(names)) == len(names)
    assert {"dp ×2", "ddp ×2", "ddp ×4", "ddp 2 nodes ×2", "ddp ×2 by torchrun"} <= set(names)
    assert "ddp ×2, micro 11, 2 loaders" in names
    assert "ddp ×2, resumed" in names
    assert "ddp ×2, resumed" not in [pair.name for pair in all_pairs(64, 1, ["native"])]


def test_of_a_lightning_module_one_process_of_lightning_is_the_reference() -> None:
    reference = Pair("single", trainer="lightning")
    names = [pair.name for pair in all_pairs(64, 5, ["lightning"], reference)]
    assert reference.name not in names
    assert {"lightning ddp ×2, resumed", "lightning ddp 2 nodes ×2", "lightning exact"} <= set(
        names
    )
    assert "lightning ddp ×2, resumed" not in [p.name for p in all_pairs(64, 5, ["lightning"])]
    assert choose(reference=reference, strategies=["single", "fsdp"], procs=[2]) == [
        "lightning fsdp ×2"
    ]


def test_which_trainer_a_job_is_compared_with(tmp_path: Path) -> None:
    job = ROOT / "examples" / "lightning" / "job.yaml"
    with Session(job, strategies=["ddp"], procs=[2]) as session:
        assert [pair.name for pair in session.pairs] == ["lightning ddp ×2"]
    with pytest.raises(PlanError, match="LitDigits is a LightningModule, which trainer 'native'"):
        Session(job, trainers=["lightning", "native"])
    with Session(TINY, overrides=["trainer=lightning"], strategies=["ddp"], procs=[2]) as session:
        assert [pair.name for pair in session.pairs] == ["ddp ×2"]


def test_clusters_that_are_known_here_have_a_row_each(tmp_path: Path) -> None:
    names = [pair.name for pair in all_pairs(64, 5, clusters=["slurm", "ray"])]
    assert {"ddp ×2 by slurm", "ddp ×2 by ray"} <= set(names)
    assert clusters_here({"PATH": str(tmp_path)}) == []
    assert clusters_here({"PATH": str(tmp_path), "RAY_ADDRESS": "127.0.0.1:6379"}) == ["ray"]
    sinfo = tmp_path / "sinfo"
    for status, found in ((1, []), (0, ["slurm"])):
        sinfo.write_text(f"#!/bin/sh\nexit {status}\n")
        sinfo.chmod(0o755)
        assert clusters_here({"PATH": str(tmp_path)}) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "/nope/x.html", "job.yaml"], "no such folder: /nope"),
        (["--gpus", "2", "job.yaml"], "--procs 2 says how many there are"),
        (["job.yaml", "other.yaml"], "one job at a time"),
    ],
)
def test_what_verify_cannot_do_is_told_before_it_trains(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert message in done.output


def choose(**asked: Any) -> list[str]:
    nothing: dict[str, Any] = dict.fromkeys(
        ("trainers", "strategies", "launchers", "nodes", "procs"), ()
    )
    return [pair.name for pair in chosen(**{**nothing, "gpus": False, **asked})]


def test_every_combination_of_what_was_asked_for() -> None:
    assert choose(strategies=["ddp", "dp"], procs=[1, 2], nodes=[1, 2]) == [
        "ddp", "ddp ×2", "ddp 2 nodes ×1", "ddp 2 nodes ×2", "dp", "dp ×2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strategies": ["dpp"]}, "unknown strategy 'dpp'"),
        ({"strategies": ["dp"], "nodes": [2]}, "strategy 'dp' runs on one node"),
        ({"strategies": ["single"]}, "nothing to compare with itself"),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose(**asked)


# -- reports ---------------------------------------------------------------------------------


def report() -> Report:
    comparison: Comparison = compare(ONE, ONE)
    good = Result(
        Pair("ddp", procs=2), "same", "L2", comparison.largest, comparison=comparison, recording=ONE
    )
    finding = Finding(DATA, "samples <3> were read 2 times", "padding & more", 3)
    results = [
        good,
        replace(good, pair=Pair("exact", procs=2), level="L3", bits_of="exact"),
        replace(good, pair=Pair("dp", procs=2), verdict="rounding", level="L1", shrinks=6e8),
        replace(good, pair=Pair("fsdp", procs=2), fixed_noise=True),
        replace(good, pair=Pair("ddp", procs=4), verdict="different", level=None, finding=finding),
        Result(Pair("ddp", procs=8), "failed", None, failure="FAILED: rank 7\n  no memory"),
    ]
    return Report("digits", 3, 137, "single", ONE, results)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal(width: int) -> None:
    made = report()
    table = text.Table([result.pair for result in made.results], width)
    lines = [table.head(), *(table.row(result) for result in made.results)]
    assert max(map(len, lines)) <= width
    assert lines[1].split() == ["ddp", "×2", "L2", "0", "-", "same"]
    assert lines[2].endswith("same = exact")
    assert lines[3].endswith("rounding")
    assert lines[4].endswith("same, noise fixed")
    assert lines[5].split() == ["ddp", "×4", "-", "0", "step", "3", "DIFFERENT"]
    assert lines[6].endswith("FAILED")


def test_what_is_said_below_the_table() -> None:
    said = text.closing(report(), 80)
    assert "ddp ×4 is a different training from step 3 on" in said
    assert f"  broken {DATA}" in said
    assert "  likely padding & more" in said
    assert "dp ×2 differs by rounding: in fp64 the difference shrinks 6e+08 times" in said
    assert "ddp ×8 failed\n  FAILED: rank 7\n    no memory" in said
    assert said.endswith("2 of 6 are not the same training")
    assert max(map(len, said.splitlines())) <= 80


def test_json_has_everything_and_no_infinity() -> None:
    made = report().to_json()
    assert made["same"] is False
    assert made["reference"]["loss"] == [1.0, 2 / 3, 0.5]
    bad = made["pairs"][4]
    assert bad["finding"]["clause"] == DATA
    assert bad["level"] is None
    assert made["pairs"][1]["same_bits_as"] == "exact"


def test_the_page_is_well_formed_and_stands_alone(tmp_path: Path) -> None:
    html.write(report(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "samples &lt;3&gt; were read 2 times" in page
    assert "src=" not in page
    assert "<script" not in page
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 7
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
    with pytest.raises(UsageError, match="cannot write"):
        html.write(report(), tmp_path / "no" / "page.html")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [None, math.nan, 0.0, 1e-9, 1e300]])
def test_any_values_can_be_drawn(values: list[float | None], log: bool) -> None:
    marks = [svg.Mark("limit", 1e-5)]
    picture = svg.chart([svg.Line("a", values, "good")], title="<t>", log=log, marks=marks)
    ElementTree.fromstring(picture)
    assert "nan" not in picture
    assert "inf" not in picture
