"""What differs between runs, and the step from which their losses do."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dtrain.api.run import Run
from dtrain.cli.compare import _lines
from dtrain.comparing.compare import Comparison, compare
from dtrain.comparing.losses import Difference, Parting, losses_of, parting
from dtrain.run import events, files, snapshot
from dtrain.run.rundir import RunDir
from support.written_runs import TRAIN, write_run

NAN = math.nan


def values(parts: Comparison) -> dict[str, dict[str, list[Any]]]:
    return {name: part for name, part in parts.sections.items() if part}


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@x")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a commit of two files, and runs that git ignores."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "-q")
    for name in ("task.py", "a b.py"):
        (folder / name).write_text("x = 1\n")
    (folder / ".gitignore").write_text("runs\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def write(folder: Path, name: str, **settings: Any) -> RunDir:
    """Write a run of the code in a repository, as a launch does."""
    run = write_run(folder / "runs", name, **settings)
    files.write_json(run.plan, json.loads(run.plan.read_text()) | {"job_dir": str(folder)})
    snapshot.take(folder, run)
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    events.note_event(run, "environment", node_rank=0, node="laptop", versions=versions)
    return run


def test_runs_of_the_same_job_and_code_are_the_same(repository: Path) -> None:
    metrics = {"train": {"loss": 0.5, "samples_per_second": 3.0}}
    one = write(repository, "a", metrics=metrics)
    metrics["train"]["samples_per_second"] = 4.0
    two = write(repository, "b", metrics=metrics, started=1.8e9)
    found = compare([one, two])
    assert found.are_same
    assert not values(found)
    assert found.losses == [Parting("b", 1, 12, None, None)]
    assert found.notes == []
    assert Run(one).compare(Run(two)) == found


def test_what_changes_the_training_is_apart_from_what_does_not(repository: Path) -> None:
    one = write(repository, "a", job={"args": {"lr": 0.1}, "launch": {"env": {"N": "1"}}})
    two = write(
        repository, "b", metrics={"eval": {"acc": 0.5}},
        job={"args": {"lr": 0.2}, "strategy": "exact", "train": {**TRAIN, "precision": "bf16"}},
    )  # fmt: skip
    found = compare([one, two])
    assert found.job == {"args.lr": [0.1, 0.2], "train.precision": ["fp32", "bf16"]}
    assert found.launch == {"strategy": ["ddp", "exact"], "launch.env.N": ["1", None]}
    assert found.environment == {"$N": ["1", None]}
    assert found.metrics == {"eval.acc": [None, 0.5]}
    assert not found.are_same


def test_files_of_the_code_that_differ(repository: Path) -> None:
    one = write(repository, "a")
    (repository / "task.py").write_text("x = 2\n")
    (repository / "a b.py").write_text("x = 2\n")
    (repository / "new.py").write_text("x = 3\n")
    two = write(repository, "b")
    (repository / "task.py").write_text("x = 4\n")
    three = write(repository, "c")
    found = compare([one, two, three]).code
    assert list(found) == ["a b.py", "new.py", "task.py"]
    assert [text and text.split(",")[0] for text in found["task.py"]] == [
        "as committed", "changed", "changed"
    ]  # fmt: skip
    assert len({*found["task.py"]}) == 3
    assert [text and text.split(",")[0] for text in found["new.py"]] == [
        None, "not in git", "not in git"
    ]  # fmt: skip
    assert list(compare([two, three]).code) == ["task.py"]


def test_files_that_changed_between_commits(repository: Path) -> None:
    one = write(repository, "a")
    (repository / "task.py").write_text("x = 2\n")
    git(repository, "commit", "-q", "-a", "-m", "second")
    two = write(repository, "b")
    found = compare([one, two])
    assert list(found.code) == ["commit"]
    (note,) = found.notes
    assert "task.py" in note
    files.write_json(one.code / "git.json", {"git": True, "sha": "--output=x"})
    assert compare([one, two]).notes == []  # no option of git
    assert not [*repository.glob("x*")]


def test_what_is_not_recorded_is_said(tmp_path: Path, repository: Path) -> None:
    found = compare([write_run(tmp_path, "a"), write_run(tmp_path, "b")])
    assert found.unknown == ["code", "environment", "data"]
    assert len([note for note in found.notes if "code of a" in note]) == 1
    lines = "\n".join(_lines(found, None))
    assert "the same: job, launch, metrics\n" in lines
    assert compare([write(repository, "a"), write(repository, "b")]).unknown == ["data"]


def test_other_versions_hosts_and_data(repository: Path) -> None:
    one, two = write(repository, "a"), write(repository, "b")
    versions = {"torch": "2.14.0"}
    events.note_event(two, "environment", node_rank=0, node="other", versions=versions)
    data = {"num_samples": 64, "fingerprint": "d5"}
    for run, size in ((one, 64), (two, 32)):
        facts = {"device": "cpu", "data": {**data, "num_samples": size}}
        events.note_event(run, "training_started", attempt=0, **facts)
    found = compare([one, two])
    assert found.data == {"num_samples": [64, 32]}
    expected = {"hosts": ["laptop", "other"], "version torch": ["2.13.0", "2.14.0"]}
    assert found.environment == expected


@pytest.mark.parametrize(
    ("one", "other", "first", "beyond"),
    [
        ({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0, 3: 0.5}, None, None),
        ({1: 2.0, 2: 1.0}, {1: 2.0, 2: 1.0000001}, (2, 1e-7), None),
        ({1: 2.0, 2: 1.0, 3: 1.0}, {1: 2.0, 2: 1.0000001, 3: 2.0}, (2, 1e-7), (3, 0.5)),
        ({1: 2.0, 2: NAN}, {1: 2.0, 2: NAN}, None, None),
        ({1: 2.0, 2: NAN}, {1: 2.0, 2: 1.0}, (2, math.inf), (2, math.inf)),
        ({1: 2.0}, {2: 2.0}, None, None),
        ({1: 0.0}, {1: -1.0}, (1, 1.0), (1, 1.0)),
    ],
)
def test_where_losses_part(one: Any, other: Any, first: Any, beyond: Any) -> None:
    def about(found: Difference | None) -> Any:
        return found and (found.step, pytest.approx(found.relative, rel=1e-3))

    found = parting("b", one, other)
    assert (about(found.first), about(found.beyond_rounding)) == (first, beyond)
    assert found.steps == len(one.keys() & other.keys())


def test_losses_of_a_step_that_was_trained_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a")
    for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5), (3, None), (4, "x")):
        line = {"time": 1.0, "step": step, "split": "train", "loss": loss}
        files.append_line(run.metrics, line)
    found = losses_of(run)
    assert found.pop(3) != found  # NaN
    assert found == {1: 3.0, 2: 1.5}


@pytest.mark.parametrize("width", [80, 200, None])
def test_lines_fit_in_the_terminal(repository: Path, width: int | None) -> None:
    long = {"args": {"text": "word " * 60, "a_very_long_name_of_an_argument_of_a_task": 1}}
    one = write(repository, "a", metrics={"train": {"loss": 2 / 3}})
    two = write(repository, "b" * 40, job=long, metrics={"train": {"loss": 1 / 3}})
    lines = _lines(compare([one, two]), width)
    if width is not None:
        assert max(map(len, lines)) <= width
    assert "step 12" in " ".join(lines)
