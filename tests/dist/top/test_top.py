"""`dtrain top` of real runs: on a terminal with its keys, in a pipe, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.errors import assert_shown
from support.launch import TINY, dtrain, events, started, status, the_run, until, wait_for_step
from support.terminal import terminal

# a run that goes on until it is stopped
LONG = (
    "launch", "--procs", "2", "--set", "args.pause=0.02", "--set", "train.steps=100000",
    "--set", "checkpoint.every_steps=20",
)  # fmt: skip


def test_a_person_watches_a_run_and_stops_it(tmp_path: Path) -> None:
    with started(*LONG, TINY, cwd=tmp_path) as launch:
        run = wait_for_step(tmp_path, 40)
        with terminal("top", cwd=tmp_path, columns=80) as screen:
            screen.until("ranks", lambda lines: any(line.startswith("   1 ") for line in lines))
            lines = screen.lines
            assert lines[0].startswith(f"{run.id}  running  local, ddp, 2 ranks")
            assert lines[1].startswith("step ")
            assert "/100,000 (0 %)" in lines[1]
            assert "ETA " in lines[1]
            assert any(line.startswith("loss ") for line in lines)
            assert any(line.startswith("node 0  cores ") for line in lines)
            assert any(line.startswith("checkpoint step-000") for line in lines)
            assert lines[11:] != [""] * len(lines[11:])
            screen.press("\x1b[Bl")  # the next rank, its log
            screen.until("log", lambda lines: "log of rank 1" in lines)
            screen.press("l")
            screen.until("ranks", lambda lines: "log of rank 1" not in lines)
            screen.press("s")
            screen.until("question", lambda lines: any("y yes" in line for line in lines))
            screen.press("n")
            screen.until("no question", lambda lines: not any("y yes" in line for line in lines))
            assert status(run)["state"] == "running"
            screen.press("sy")
            screen.until("end", lambda lines: "cancelled" in lines[0])
            screen.press("q")
            assert screen.wait() == 0
        launch.wait(60)
    assert events(run, "stopped")
    assert status(run)["state"] == "cancelled"


@pytest.mark.parametrize("columns", [80, 200])
def test_a_run_that_has_failed(tmp_path: Path, columns: int) -> None:
    fails = ("--set", "args.misbehave=raise", "--set", "args.rank=0", "--set", "args.at=4")
    assert dtrain("launch", *fails, TINY, cwd=tmp_path).returncode == 1
    with terminal("top", cwd=tmp_path, columns=columns) as screen:
        screen.until("end", lambda lines: "failed" in lines[0])
        screen.until("failure", lambda lines: any("rank 0 on " in line for line in lines))
        assert max(map(len, screen.lines)) <= columns
        screen.press("q")
        assert screen.wait() == 0


def test_a_pipe_gets_lines_until_the_end(tmp_path: Path) -> None:
    with started("launch", "--set", "args.pause=0.2", TINY, cwd=tmp_path) as launch:
        wait_for_step(tmp_path, 2)
        watched = dtrain("top", cwd=tmp_path)
        assert watched.returncode == 0, watched.stderr
        launch.wait(60)
    first, last = watched.stdout.splitlines()
    assert first.startswith("running, ")
    assert "ETA " in first
    assert last.startswith("succeeded, 12/12 (100 %), loss ")


def test_json_has_the_newest_of_everything(tmp_path: Path) -> None:
    with started(*LONG, TINY, cwd=tmp_path) as launch:
        run = wait_for_step(tmp_path, 60)
        until("a record of both ranks", lambda: len(read(tmp_path)["ranks"]) == 2)
        found = read(tmp_path)
        assert found["id"] == run.id
        assert found["state"] == "running"
        assert 60 <= found["step"] < found["total_steps"] == 100_000
        assert found["eta_seconds_with_restarts"] >= found["eta_seconds"] > 100
        assert found["metrics"]["train/loss"] > 0
        assert found["ranks"]["1"]["forward"] > 0
        assert found["nodes"]["0"]["memory_total"] > 0
        assert found["checkpoint"].startswith("step-")
        assert dtrain("cancel", run.id, cwd=tmp_path).returncode == 0
        launch.wait(60)


def read(folder: Path) -> dict[str, object]:
    done = dtrain("top", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_script_and_a_run_that_is_not_there(tmp_path: Path) -> None:
    missing = dtrain("top", "x", cwd=tmp_path)
    assert missing.returncode == 2
    assert_shown(missing.stderr, "run.no-runs")
    (tmp_path / "script.py").write_text("import warnings\nwarnings.warn('look out')\n")
    assert dtrain("launch", "--procs", "2", "script.py", cwd=tmp_path).returncode == 0
    found = read(tmp_path)
    assert (found["id"], found["state"]) == (the_run(tmp_path).id, "succeeded")
    own = [each for each in found["warnings"].items() if "look out" in each[0]]  # type: ignore[attr-defined]
    assert [ranks for _, ranks in own] == [[0, 1]]
