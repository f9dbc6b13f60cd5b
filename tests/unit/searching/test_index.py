"""Rows that are remembered are never stale, and nothing depends on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.run import files
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from dtrain.searching import index
from dtrain.searching.index import entries
from support.written_runs import end, write_run

PROBE = """
import json, sys
from dtrain.searching.index import entries
rows = [entry.row for entry in entries(sys.argv[1])]
print(json.dumps([rows, "pydantic" in sys.modules]))
"""


@pytest.fixture(autouse=True)
def _remembered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that were written a moment ago are remembered too."""
    monkeypatch.setattr(index, "_SETTLED_NS", 0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path, "digits-abc", metrics={"eval": {"accuracy": 0.5}})


def row(run: RunDir) -> dict[str, Any]:
    (entry,) = entries(run.path.parent)
    return entry.row


def remembered(runs: Path) -> Path:
    return runs / f".index-{os.geteuid()}"


def test_the_row_of_an_ended_run_needs_none_of_its_files(run: RunDir) -> None:
    first = row(run)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(run.path.parent)], capture_output=True, check=True
    )
    rows, has_read = json.loads(done.stdout)
    assert rows == [first]
    assert not has_read
    assert remembered(run.path.parent).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", ["metric", "resume", "result", "plan", "job", "event"])
def test_a_run_that_has_changed_is_read_again(run: RunDir, change: str) -> None:
    before = row(run)
    entry: Any = None
    if change == "metric":
        line = {"time": 2e9, "step": 13, "epoch": 0, "split": "eval", "accuracy": 0.75}
        files.append_line(run.metrics, line)
        assert row(run)["eval"] == {"accuracy": 0.75}
    elif change == "resume":
        Handle.of_this_process("local", 1).claim(run)
        assert (row(run)["state"], row(run)["attempt"]) == ("running", 1)
        end(run, "failed", attempt=1)
        assert row(run)["state"] == "failed"
    elif change == "result":  # in place, with the same size and time of change as a user sets it
        path = run.result(0)
        stat, text = path.stat(), path.read_text()
        path.write_text(text.replace('"exit_code": 0', '"exit_code": 7'))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (before["exit_code"], row(run)["exit_code"]) == (0, 7)
    elif change == "plan":
        files.write_json(run.plan, {**json.loads(run.plan.read_text()), "strategy": "ddp"})
        assert row(run)["strategy"] == "ddp"
    elif change == "job":
        run.resolved.write_text(run.resolved.read_text().replace("seed: 0", "seed: 5"))
        (entry,) = entries(run.path.parent)
        assert entry.job["seed"] == 5
    else:
        event = {"time": 2e9, "event": "checkpoint_saved", "checkpoint": "step-00000012"}
        files.append_line(run.events, event)
        assert row(run)["checkpoint"] == "step-00000012"


def test_a_running_run_and_a_damaged_one_are_not_remembered(run: RunDir, tmp_path: Path) -> None:
    write_run(tmp_path, "digits-def", state=None)
    damaged = write_run(tmp_path, "digits-ghi")
    damaged.handle(0).write_text("{")
    states = {entry.run.id: entry.row["state"] for entry in entries(tmp_path)}
    expected = {"digits-abc": "succeeded", "digits-def": "running", "digits-ghi": "damaged"}
    assert states == expected
    for name in ("digits-def", "digits-ghi"):
        assert name not in remembered(tmp_path).read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"accuracy": 0.5', '"accuracy": 0.9'),
        lambda text: text.replace("\t", " "),
        lambda text: "0 0.0.1" + text[text.index("\n") :],
    ],
    ids=["empty", "cut", "changed", "other separator", "other version"],
)
def test_damage_of_what_is_remembered_has_no_effect(run: RunDir, damage: Any) -> None:
    before = row(run)
    file = remembered(run.path.parent)
    file.write_text(damage(file.read_text()))
    assert row(run) == before
    assert "0.5" in file.read_text()  # written again


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "[\n" * 100_000,
        "? " * 100_000,
        "a: *b",
        "3",
    ],
)
def test_a_job_that_cannot_be_read_has_no_fields(run: RunDir, text: str) -> None:
    run.resolved.write_text(text)
    (entry,) = entries(run.path.parent)
    assert entry.job == {}
    assert entry.row["state"] == "succeeded"


def test_a_directory_that_cannot_be_written_to_is_read(run: RunDir) -> None:
    remembered(run.path.parent).mkdir()
    assert row(run)["eval"] == {"accuracy": 0.5}


def test_runs_that_were_moved_have_their_new_path(run: RunDir, tmp_path: Path) -> None:
    row(run)
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    (entry,) = entries(moved)
    assert entry.row["path"] == str(moved / "digits-abc")
    moved.rename(tmp_path)


def test_a_run_that_is_gone_is_forgotten(run: RunDir, tmp_path: Path) -> None:
    other = write_run(tmp_path, "digits-def")
    assert len(entries(tmp_path)) == 2
    other.resolved.unlink()
    assert [entry.run.id for entry in entries(tmp_path)] == ["digits-abc"]
    assert "digits-def" not in remembered(tmp_path).read_text()


def test_several_processes_may_remember_at_once(run: RunDir, tmp_path: Path) -> None:
    for number in range(20):
        write_run(tmp_path, f"digits-{number}")
    probe = PROBE.replace(
        "rows = ", "from dtrain.searching import index; index._SETTLED_NS = 0; rows = "
    )
    command = [sys.executable, "-c", probe, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    outputs = [json.loads(each.communicate(timeout=60)[0])[0] for each in processes]
    assert [each.returncode for each in processes] == [0] * 4
    assert all(output == outputs[0] for output in outputs)
    assert len(remembered(tmp_path).read_text().splitlines()) == 1 + 21
    assert not [*tmp_path.glob("..index*")]
