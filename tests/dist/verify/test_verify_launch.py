"""`dtrain verify` as a person uses it, with real launches; and what docs/same-training.md shows."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.run.rundir import list_runs
from dtrain.trace import TraceOptions
from dtrain.verification.layouts import Layout, accumulating
from dtrain.verification.lengths import epoch_samples
from dtrain.verification.rules import GRADIENT
from dtrain.verification.runner import Runner
from support import ROOT
from support.errors import assert_named
from support.launch import (
    TINY,
    alive,
    descendants,
    dtrain,
    events,
    metrics,
    started,
    the_run,
    wait_for,
)

BUGS = ROOT / "tests" / "jobs" / "bugs"
TEXT = ROOT / "examples" / "text" / "job.yaml"
DOCUMENT = ROOT / "docs" / "same-training.md"

DDP_2 = ("--strategy", "ddp", "--procs", "2")
TIMEOUT_S = 900  # of a dozen launches, each 4 s on a free machine


@pytest.fixture(autouse=True)
def one_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's too, which saves it an interpreter of its own: 3.5 CPU seconds."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def runs_in(temporary: Path) -> list[Path]:
    """The runs that `verify` has left behind; torch leaves an empty directory of its own."""
    return list(temporary.glob("dtrain-*"))


def test_a_bug_that_is_launched_is_found_and_shown(tmp_path: Path) -> None:
    done = dtrain(
        "verify", *DDP_2, "--only", "--set", "launch.preload=[mean_of_means]",
        "--html", "page.html", BUGS / "job.yaml",
        cwd=tmp_path, timeout=TIMEOUT_S, env={"PYTHONPATH": str(BUGS), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^ddp ×2 +L0 .* DIFFERENT$", done.stdout, re.MULTILINE), done.stdout
    assert "ddp ×2 is a different training from step 1 on" in done.stdout
    assert "a mean of means: ranks have the weights" in done.stdout
    assert "mean of means" in (tmp_path / "page.html").read_text()
    assert runs_in(tmp_path) == []


def test_what_depends_on_the_order_of_a_set_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED")
    task = (TINY.parent / "task.py").read_text().replace(
        "return torch.utils.data.TensorDataset(inputs, targets)",
        "return [(row, y + list({'a', 'b', 'c', 'd', 'e'}).index('a')) "
        "for row, y in zip(inputs, targets)]",
    )  # fmt: skip
    (tmp_path / "task.py").write_text(task)
    (tmp_path / "job.yaml").write_text(TINY.read_text())
    done = dtrain("verify", *DDP_2, "--only", "job.yaml", cwd=tmp_path, timeout=TIMEOUT_S)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_named(done.stdout, ["[verify.other-samples]", "rank 0: its [1] differs"])
    assert "PYTHONHASHSEED" in done.stdout


def test_a_pair_that_fails_is_shown_with_its_verdict(tmp_path: Path) -> None:
    done = dtrain(
        "verify", "--json", "--steps", "2", *DDP_2, "--only", "--keep", "kept",
        "--set", "args.misbehave=raise", "--set", "args.at=2", TINY,
        cwd=tmp_path, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["same"] is False
    assert len(report["reference"]["loss"]) == 2
    (layout,) = report["layouts"]
    assert (layout["layout"], layout["verdict"], layout["level"]) == ("ddp ×2", "failed", None)
    assert layout["failure"].startswith("FAILED: rank 1 on node 0")
    assert "does not like this batch" in layout["failure"]
    assert len(list((tmp_path / "kept").iterdir())) == 2


def verified(cwd: Path, *arguments: str | Path) -> dict[str, dict[str, Any]]:
    """What `--json` says of each row of the job with the bugs, by name."""
    report = reported(cwd, *arguments, BUGS / "job.yaml")
    return {layout["layout"]: layout for layout in report["layouts"]}


def reported(cwd: Path, *arguments: str | Path) -> dict[str, Any]:
    done = dtrain(
        "verify", "--json", *arguments, cwd=cwd, timeout=TIMEOUT_S, env={"PYTHONPATH": str(BUGS)}
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


def test_what_one_row_misses_is_found_by_those_that_come_with_it(tmp_path: Path) -> None:
    bug = ("--set", "launch.preload=[momentum_lost]")
    rows = verified(tmp_path, *DDP_2, *bug)
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "ddp ×2": "same",
        "ddp ×2, micro 3, 2 loaders": "same",
        "ddp ×2, resumed": "different",
        "exact ×2": "same",
    }
    assert list(verified(tmp_path, *DDP_2, *bug, "--only")) == ["ddp ×2"]


def test_a_millionth_is_seen_in_fp64(tmp_path: Path) -> None:
    asked = (*DDP_2, "--only", "--set", "launch.preload=[a_millionth_more]")
    assert verified(tmp_path, *asked)["ddp ×2"]["verdict"] == "same"
    row = verified(tmp_path, *asked, "--deep")["ddp ×2"]
    assert (row["verdict"], row["level"], row["shrinks_in_fp64"]) == ("different", "L0", None)
    assert row["finding"]["rule"] == GRADIENT
    assert 1e-8 < row["largest_difference"]["value"] < 1e-5


def test_a_job_without_a_bug_is_the_same_in_fp64(tmp_path: Path) -> None:
    report = reported(tmp_path, "--deep", *DDP_2, BUGS / "job.yaml")
    assert report["deep"] is True
    levels = {row["layout"]: (row["verdict"], row["level"]) for row in report["layouts"]}
    assert levels == {
        "ddp ×2": ("same", "L1"),
        "ddp ×2, micro 3, 2 loaders": ("same", "L1"),
        "ddp ×2, resumed": ("same", "L3"),
        "exact ×2": ("same", "L1"),
    }


def test_what_exact_cannot_train_is_left_out_unless_it_was_asked_for(tmp_path: Path) -> None:
    job = ("--set", "launch.preload=[sparse]", BUGS / "job.yaml")
    report = reported(tmp_path, "--strategy", "dp", "--procs", "2", *job)
    assert report["same"] is True
    assert len(report["layouts"]) == 3
    ((left_out),) = report["left_out"]
    assert left_out["layout"] == "exact ×2"
    assert left_out["why"].startswith("table makes sparse gradients")
    asked_for = reported(tmp_path, "--only", "--strategy", "exact", "--procs", "2", *job)
    assert [row["verdict"] for row in asked_for["layouts"]] == ["failed"]


def test_batch_norm_trains_in_shards_and_micro_batches() -> None:
    """20 samples are 8 shards of 2 or 3; a short batch of 9 would leave one alone in most."""
    job = ("args.norm=true", "train.global_batch_size=20")
    with Runner(BUGS / "job.yaml", overrides=job) as runner:
        layouts = [
            Layout("exact", procs=2),
            accumulating(Layout("ddp", procs=2), runner.spec.train),
        ]
        train, evaluated = epoch_samples(runner.spec, layouts)
        runner.trace_options = TraceOptions(max_train_samples=train, max_eval_samples=evaluated)
        runner.warm_up(layouts)
        for layout in layouts:
            recording = runner.record(layout)
            assert recording.last_step == 5
            assert len(recording.ids(3)) < 20, "there was a short batch"


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["--strategy", "dpp"], "plan.unknown-name", "'dpp'"),
        (["--strategy", "dp", "--nodes", "2"], "verify.nothing-to-compare", "strategy 'dp'"),
        (["--procs", "two"], "usage.invalid-value", "'two'"),
        (["--epoch-samples", "few"], "usage.invalid-value", "'few'"),
        (["--set", "train.stepz=3"], "job.unknown-field", "'steps'?"),
        (["--launcher", "slum", "--steps", "1"], "profile.not-found", "--launcher slum"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(
    tmp_path: Path, arguments: list[str], code: str, name: str
) -> None:
    done = dtrain("verify", *arguments, TINY, cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 2, done.stdout
    assert f"  [{code}]\n" in done.stderr
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_job_that_does_not_run_at_all(tmp_path: Path) -> None:
    done = dtrain(
        "verify", "--set", "args.misbehave=raise", "--set", "args.rank=0", TINY, cwd=tmp_path
    )
    assert done.returncode == 1
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith("dtrain: ")
    assert first.endswith("  [verify.reference-failed]")
    assert second.startswith("FAILED: rank 0 ")
    assert second.endswith("  [failure.exception]")
    assert "`--keep DIR`" in done.stderr.splitlines()[-1]
    assert "log:" not in done.stderr  # it is gone
    assert "Traceback" not in done.stderr


def test_interrupted_it_leaves_nothing(tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    with started("verify", "--set", "args.pause=0.2", TINY, cwd=tmp_path, env=environment) as it:
        assert wait_for(lambda: list(tmp_path.glob("*/*/events.jsonl")), 60)
        below = descendants(it.pid)
        it.send_signal(signal.SIGINT)
        output, _ = it.communicate(timeout=60)
    assert it.returncode == 130, output
    assert "Traceback" not in output
    assert wait_for(lambda: not any(process.is_running() for process in below), 20)
    assert runs_in(tmp_path) == []


def test_killed_it_leaves_no_process(tmp_path: Path) -> None:
    """Neither of the row that runs nor the server from which that was forked."""
    asked = (*DDP_2, "--only", "--keep", "kept", "--set", "args.pause=0.2")
    with started("verify", *asked, TINY, cwd=tmp_path) as it:
        assert wait_for(lambda: workers_of_ddp(tmp_path / "kept"), 60)
        below = descendants(it.pid)
        assert len(below) >= 5  # server, node, agent, two ranks
        it.send_signal(signal.SIGKILL)
        it.communicate(timeout=60)
        assert wait_for(lambda: not any(map(alive, below)), 20)


def workers_of_ddp(kept: Path) -> bool:
    starts = [event for run in list_runs(kept) for event in events(run, "workers_started")]
    return any(len(start["pids"]) == 2 for start in starts)


def test_the_text_example_trains(tmp_path: Path) -> None:
    small = ("width=16", "depth=1", "length=32", "modules=10")
    settings = [part for each in small for part in ("--set", f"args.{each}")]
    done = dtrain("launch", *settings, "--set", "train.steps=6", TEXT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(tmp_path)
    assert len(events(run, "finished")) == 1
    (evaluation,) = metrics(run, "eval")
    assert 4 < evaluation["bits_per_byte"] < 8.2, "better than guessing among 256"


# -- docs/same-training.md -------------------------------------------------------------------


def shown() -> Iterator[tuple[str, str]]:
    """The (command, output) of every block of the document that shows one."""
    blocks = re.findall(r"^```text\n\$ ([^\n]*)\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    yield from blocks


def comparable(output: str) -> list[Any]:
    """What is the same on every machine: layouts, verdicts, levels, causes; not how many digits.

    Whether a difference of rounding is within L2 or is shown to be rounding in fp64 depends on
    the machine's matrix library.
    """
    rows: list[Any] = []
    in_table = False
    for line in output.splitlines():
        cells = re.split(r"  +", line.strip())
        if cells[0] == "layout":
            in_table = True
        elif in_table and len(cells) > 1:
            level = "L1 or L2" if cells[1] in ("L1", "L2") else cells[1]
            rows.append((cells[0], level, cells[-1].replace("rounding", "same")))
        else:
            in_table = False
            rows.append(re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "0", line))
    return [row for row in rows if not (isinstance(row, str) and "by rounding" in row) and row]


@pytest.mark.parametrize("command", [command for command, _ in shown()])
def test_the_document_shows_what_comes_out(command: str, tmp_path: Path) -> None:
    expected = dict(shown())[command]
    name, *arguments = command.split()
    assert name == "dtrain"
    paths = [str(ROOT / part) if part.endswith(".yaml") else part for part in arguments]
    done = dtrain(*paths, cwd=tmp_path, timeout=TIMEOUT_S, env={"COLUMNS": "100"})
    assert done.returncode == (1 if "DIFFERENT" in expected else 0), done.stdout + done.stderr
    assert comparable(done.stdout) == comparable(expected), done.stdout


def test_the_document_shows_some() -> None:
    commands = [command for command, _ in shown()]
    assert any("examples/digits" in command for command in commands)
    assert any("examples/text" in command for command in commands)
