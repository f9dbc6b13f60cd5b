"""Logs by rank, metrics and events as JSON lines; nothing is configured at import."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.files import read_lines
from dtrain.run.rundir import RunDir
from dtrain.train.logs import setup_logging
from dtrain.train.metrics.events import Events
from dtrain.train.metrics.writer import Metrics

JOB = JobSpec.model_validate(
    {"name": "t", "task": "t:T", "train": {"steps": 1, "global_batch_size": 1}}
)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def say(run: RunDir, rank: int, *, own_file: bool) -> None:
    setup_logging(run, RankInfo(rank=rank, world_size=4, node_rank=1), 2, own_file=own_file)
    logging.getLogger("task").info("in passing")
    logging.getLogger("task").debug("never")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look out", stacklevel=1)


def test_on_a_shared_console_rank_zero_speaks_and_others_warn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    say(run, 0, own_file=True)
    out, err = capsys.readouterr()
    assert "INFO task: in passing" in out
    assert "look out" in out
    assert err == ""
    say(run, 3, own_file=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "WARNING py.warnings:" in err
    assert "in passing" not in err
    for rank in (0, 3):
        text = run.rank_log(2, 1, rank).read_text()
        assert "INFO task: in passing" in text
        assert "look out" in text
        assert "never" not in text


def test_with_a_stdout_of_its_own_every_rank_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(RunDir(tmp_path), 3, own_file=False)
    out, err = capsys.readouterr()
    assert "INFO task: in passing" in out
    assert (err, list(tmp_path.iterdir())) == ("", [])


def test_setting_up_again_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        setup_logging(RunDir(tmp_path), RankInfo(), 0, own_file=False)
    logging.getLogger("task").info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_nothing_is_configured_at_import() -> None:
    code = (
        "import logging, dtrain.train.loop.native, dtrain.train.logs; "
        "assert not logging.getLogger().handlers; assert logging.getLogger().level == 30"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_rank_zero_writes_lines(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for rank in (0, 1):
        ranks = RankInfo(rank=rank, world_size=2, restart=1)
        Events(run, ranks, 3).write("resumed", step=5)
        metrics = Metrics(run, JOB, active=rank == 0)
        metrics.begin(0)
        metrics.write("train", 6, 1, {"loss": 0.5})
        metrics.close()
    (event,), (line,) = read_lines(run.events), read_lines(run.metrics)
    assert event.pop("time") > 1e9
    assert event == {"event": "resumed", "attempt": 3, "restart": 1, "step": 5}
    assert line.pop("time") > 1e9
    assert line == {"step": 6, "epoch": 1, "split": "train", "loss": 0.5}
