"""Failure records are what a failed process has told; nothing else is taken for one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dtrain import checked
from dtrain.node.store import Member, PeerFailed, RendezvousFailed, RendezvousSettings, Round
from dtrain.plainjson import to_json
from dtrain.run import failures, files
from dtrain.run.failures import FailureRecord, Frame
from dtrain.run.rundir import RunDir

RECORD = FailureRecord(
    "exception", "no \udcff such file", 1, 0, "gpu-a", rank=3, time=12.5, pid=7, type="OSError",
    frames=[Frame("task.py", 3, "loss", "open(name)")], step=4,
)  # fmt: skip
SETTINGS = RendezvousSettings(
    "run/0", "127.0.0.1", 1, 1, "b", 2, 2, join_timeout_s=1.0, token=b"t" * 32
)

FORGED: list[tuple[str, Any]] = [
    ("node_rank", "../../../x"),
    ("node_rank", -1),
    ("node_rank", True),
    ("node_rank", 1.0),
    ("rank", "0"),
    ("rank", 1 << 40),
    ("kind", "planted"),
    ("time", None),
    ("message", ["x"]),
    ("exit_code", "77"),
    ("frames", {"file": "x"}),
    ("frames", [{"file": "x"}]),
    ("collateral", 1),
    ("another", 1),
]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    RECORD.write(run, 0)
    (read,) = failures.read_all(run, 0)
    assert replace(read, message="") == replace(RECORD, message="")
    assert read.message == "no ? such file"  # which no file can hold


def test_a_text_that_fills_the_disk_is_cut(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    replace(RECORD, traceback="x" * 10_000_000).write(run, 0)
    (read,) = failures.read_all(run, 0)
    assert len(read.traceback) < 100_000


def test_an_error_with_a_long_message_can_still_be_sent() -> None:
    error = ValueError("x" * 10_000_000)
    record = failures.of_exception(error, rank=0, node_rank=0, restart=0, log="")
    assert len(PeerFailed("why", record).to_json()) < 1_000_000


@pytest.mark.parametrize(("name", "value"), FORGED)
def test_what_is_forged_is_no_record(tmp_path: Path, name: str, value: Any) -> None:
    raw = {**asdict(RECORD), name: value}
    with pytest.raises(ValueError, match=rf"{name}[^\n]*\Z"):
        checked.read(FailureRecord, to_json(raw))
    run = RunDir(tmp_path)
    files.write_json(run.failure(0, 3), raw)
    assert failures.read_all(run, 0) == []
    error = PeerFailed.from_json(json.dumps({"reason": "x", "record": raw, "signal": None}))
    assert error.record is None
    assert name in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"x"', "[" * 100_000, "\x00", "{}"])
def test_junk_is_recognised(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    files.make_parent(run.failure(0, 0))
    run.failure(0, 0).write_text(text)
    assert failures.read_all(run, 0) == []
    assert PeerFailed.from_json(text).record is None
    with pytest.raises(RendezvousFailed):
        Member.from_json(text)
    with pytest.raises(RendezvousFailed):
        Round.from_json(text, SETTINGS)


@pytest.mark.parametrize("ranks", [[], [0], [1, 1], [1, 0], [0, 1, 2], [0, -1]])
def test_a_round_without_this_node_or_with_others_is_none(ranks: list[int]) -> None:
    members = [{"node_rank": rank, "name": "n", "address": "10.0.0.1"} for rank in ranks]
    with pytest.raises(RendezvousFailed):
        Round.from_json(json.dumps({"members": members, "port": 5}), SETTINGS)


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of temporary files."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def full(path: Path) -> RunDir:
    """A run whose failures cannot be written where they belong."""
    run = RunDir(path)
    run.attempt(0).mkdir(parents=True)
    run.failures(0).write_text("no directory")
    return run


def test_records_of_a_full_disk_are_private_and_of_one_run(tmp_path: Path, temp: Path) -> None:
    run, namesake = full(tmp_path / "a" / "ci"), full(tmp_path / "b" / "ci")
    RECORD.write(run, 0)
    (folder,) = temp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [record.rank for record in failures.read_all(run, 0)] == [3]
    assert failures.read_all(namesake, 0) == failures.read_all(run, 1) == []
    failures.remove_fallback_dir(run, 0)
    assert not list(temp.iterdir())


def _others_can_write(folder: Path) -> None:
    folder.chmod(0o777)


def _another_owner(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(folder, 12345, 12345)


def _a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize("make", [_others_can_write, _another_owner, _a_link])
def test_a_folder_that_another_account_made_is_not_believed(
    tmp_path: Path, temp: Path, make: Any
) -> None:
    run = full(tmp_path / "ci")
    RECORD.write(run, 0)
    (folder,) = temp.iterdir()
    make(folder)
    assert failures.read_all(run, 0) == []
    replace(RECORD, rank=5).write(run, 0)
    assert not (folder / "rank-00005.json").exists()
    failures.remove_fallback_dir(run, 0)
    assert folder.exists()


def test_junk_in_the_folder_is_passed_over(tmp_path: Path, temp: Path) -> None:
    run = full(tmp_path / "ci")
    RECORD.write(run, 0)
    (folder,) = temp.iterdir()
    (folder / "rank-00004.json").write_text('{"kind": ')
    assert [record.rank for record in failures.read_all(run, 0)] == [3]
