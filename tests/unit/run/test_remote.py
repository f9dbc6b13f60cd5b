"""Runs at a URL, here file://: what travels, what makes a checkpoint exist, what is refused."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dtrain.errors import CheckpointError
from dtrain.launch_plan import LaunchPlan
from dtrain.run import code_archive, failures, snapshot, sync
from dtrain.run.attempts import is_silent
from dtrain.run.failures import FailureRecord
from dtrain.run.files import append_line, write_json
from dtrain.run.remote import mirror
from dtrain.run.remote import store as place_module
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.remote.chunks import at_once
from dtrain.run.remote.mirror import Mirror
from dtrain.run.remote.rank_files import RemoteRankFiles
from dtrain.run.remote.runs import create, fetch, staging, syncing
from dtrain.run.remote.store import RemoteStore, RemoteStoreError
from dtrain.run.rundir import RunDir, list_runs
from dtrain.run.sync import ChangeScanner, apply_changes
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.checkpoint.store import CheckpointStore
from support.checkpoints import TENSORS, save, store
from support.errors import raises


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/there"


def run_at(url: str, folder: Path, run_id: str = "run-1") -> RunDir:
    run = RunDir(folder / run_id)
    run.create()
    run.url_file.write_text(f"{url}/{run_id}")
    return run


# ---------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("wrong", "code", "name"),
    [
        ("foo://bucket/runs", "url.invalid", "Protocol not known: foo"),
        ("memory://runs", "url.in-memory", "memory://"),
        ("s3://", "url.invalid", "s3://bucket/runs"),
        ("s3://ME:hush@bucket/runs", "url.password", "bucket"),
    ],
)
def test_urls_that_cannot_be_a_place_of_runs(wrong: str, code: str, name: str) -> None:
    with raises(code, name) as caught:
        RemoteStore(wrong)
    assert "hush" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(importlib.import_module("fsspec.registry"), "registry", {})
    with raises("plan.missing-package", "s3fs", "pip install 'dtrain[s3]'"):
        RemoteStore("s3://bucket/runs")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises("url.unreachable", f"file://{tmp_path}/file/runs"):
        RemoteStore(f"file://{tmp_path}/file/runs").check()


# ---------------------------------------------------------------------- small files


def test_both_copies_become_alike_and_only_what_is_new_travels(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PIECE", 1000)
    here, there = run_at(url, tmp_path / "a"), run_at(url, tmp_path / "b")
    run_url = str(here.url)
    (here.path / ".env.json").write_text("hush")
    (here.checkpoint(1)).mkdir()
    (here.checkpoint(1) / TENSORS).touch()
    (here.code / "tree-0").mkdir(parents=True)
    (here.code / "tree-0" / "task.py").touch()
    log = here.rank_log(0, 1, 3)
    write_json(here.plan, {"a": 1})
    log.parent.mkdir(parents=True)
    written: list[str] = []
    monkeypatch.setattr(
        RemoteStore, "write", lambda self, name, data, old=RemoteStore.write: written.append(name)
        or old(self, name, data),
    )  # fmt: skip
    for round_ in range(4):
        with log.open("ab") as file:
            file.write(bytes([65 + round_]) * 700)
        append_line(here.metrics, {"step": round_})
        written.clear()
        Mirror(here, run_url).push()
        Mirror(there, run_url).pull()
        assert there.metrics.read_text() == here.metrics.read_text()
        assert there.rank_log(0, 1, 3).read_bytes() == log.read_bytes()
    assert [name for name in written if ".log" in name] == [
        "attempts/0/node-1/rank-00003.log.part-000002"
    ]
    assert there.plan.read_text() == here.plan.read_text()
    names = set(RemoteStore(run_url).files())
    assert not [n for n in names if "env" in n or "checkpoints" in n or "tree-0" in n]
    written.clear()
    Mirror(here, run_url).push()
    Mirror(there, run_url).push()  # what was brought is not sent back
    assert written == []


def test_syncing_that_fails_is_reported_at_the_end_and_can_be_repeated(
    url: str, tmp_path: Path
) -> None:
    run = run_at(url, tmp_path / "a")
    (tmp_path / "there").touch()  # no directory
    notices: list[str] = []
    with syncing(run, notices.append):
        write_json(run.plan, {})
    assert [url in text for text in notices] == [True]
    (tmp_path / "there").unlink()
    Mirror(run, str(run.url)).push()
    assert "plan.json" in RemoteStore(str(run.url)).files()


def test_runs_are_found_by_name_newest_last_and_those_removed_go(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path / "staging"))
    for number, run_id in enumerate(("b-1", "a-2")):
        run = run_at(url, tmp_path / "other", run_id)
        run.resolved.touch()
        Mirror(run, str(run.url)).push()
        os.utime(tmp_path / "there" / run_id / "resolved.yaml", (number, number))
    folder = fetch(url, "last")
    assert [run.id for run in list_runs(folder)] == ["a-2"]
    assert [run.id for run in list_runs(fetch(url))] == ["b-1", "a-2"]
    for path in (tmp_path / "there" / "a-2").iterdir():
        path.unlink()
    assert [run.id for run in list_runs(fetch(url))] == ["b-1"]
    assert folder == staging(url) != staging(f"{url}2")


def test_a_run_that_has_not_been_heard_of_for_two_minutes_is_lost(url: str, tmp_path: Path) -> None:
    run = run_at(url, tmp_path / "here")
    assert not is_silent(run, 0)
    for seconds, silent in ((100, False), (130, True)):
        write_json(run.heartbeat, {"time": time.time() - seconds})
        assert is_silent(run, 0) == silent


def test_copies_that_nobody_has_looked_at_for_two_weeks_go(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "staging"
    for run_id, days, ahead in (("old", 15, False), ("new", 13, False), ("unwritten", 15, True)):
        run = run_at(url, folder, run_id)
        run.resolved.touch()
        if ahead:
            (run.path / ".ahead").touch()
        os.utime(run.path, (0, time.time() - days * 86400))
    create(RunDir(folder / "now"), f"{url}/now")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "now", "unwritten"]


def test_a_large_file_that_is_written_anew_stays_on_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_MAX_FILE_BYTES", 100)
    scanner = ChangeScanner(tmp_path)
    (tmp_path / "small.bin").write_bytes(b"x" * 100)
    (tmp_path / "large.bin").write_bytes(b"x" * 101)
    assert [change["name"] for change in scanner.next_changes()] == ["small.bin"]
    assert scanner.next_changes() == []


# ---------------------------------------------------------------------- checkpoints


def saved(run: RunDir, *steps: int, keep: int = 5) -> CheckpointStore:
    checkpoints = store(run, keep)
    for step in steps:
        save(checkpoints, step, torch.full((9,), step))
    return checkpoints


def steps_of(run: RunDir) -> list[str]:
    remote = RemoteCheckpoints.of(run)
    assert remote is not None
    return sorted(folder.name for folder in remote.folders())


def loaded(run: RunDir) -> Any:
    return store(run).load_newest(lambda _: None, keep_open=True)


def test_another_host_goes_on_from_the_newest(url: str, tmp_path: Path) -> None:
    saved(run_at(url, tmp_path / "a"), 2, 4, 6, keep=2)
    other = run_at(url, tmp_path / "b")
    assert steps_of(other) == ["step-00000004", "step-00000006"]
    found = loaded(other)
    assert (found.progress, found.rejected) == ({"step": 6}, {})
    assert torch.equal(found.tensors["model"].read(), torch.full((9,), 6))


def test_without_its_manifest_there_is_no_checkpoint(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(url, tmp_path / "a")
    saved(run, 2)
    with monkeypatch.context() as killed:
        killed.setattr(RemoteStore, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            saved(run, 4)
    left = tmp_path / "there" / "run-1" / "checkpoints" / "step-00000004"
    assert list(left.rglob(TENSORS))
    assert steps_of(run) == ["step-00000002"]
    assert loaded(run_at(url, tmp_path / "b")).progress == {"step": 2}
    saved(run, 6)
    assert not list(left.rglob("*.*"))  # what it left is cleared away


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_damage_at_the_url_falls_back_and_is_set_aside(
    url: str, tmp_path: Path, damage: str
) -> None:
    saved(run_at(url, tmp_path / "a"), 2, 4)
    (model,) = (tmp_path / "there").rglob("step-00000004/*/rank-00000.safetensors")
    if damage == "flip":
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    else:
        model.unlink()
    other = run_at(url, tmp_path / "b")
    found = loaded(other)
    assert found.progress == {"step": 2}
    assert "rank-00000.safetensors is" in found.rejected["step-00000004"]
    assert steps_of(other) == ["step-00000002"]


def test_none_that_is_good_is_an_error_that_names_the_url(url: str, tmp_path: Path) -> None:
    saved(run_at(url, tmp_path / "a"), 2)
    for model in (tmp_path / "there").rglob(TENSORS):
        model.unlink()
    with raises("checkpoint.none-loads", "step-00000002: ", url, kind=CheckpointError):
        loaded(run_at(url, tmp_path / "b"))


def test_a_stale_copy_on_a_host_is_not_taken_for_the_checkpoint(url: str, tmp_path: Path) -> None:
    """A node that was lost while it uploaded comes back with files of a step that others redid."""
    a, b = run_at(url, tmp_path / "a"), run_at(url, tmp_path / "b")
    saved(a, 4)
    save(store(b), 4, torch.zeros(9))
    assert torch.equal(loaded(a).tensors["model"].read(), torch.zeros(9))
    assert len(list((tmp_path / "there").rglob(TENSORS))) == 1  # the other's are gone


def test_the_best_is_kept_under_its_name_and_replacement_args_a_whole(
    url: str, tmp_path: Path
) -> None:
    run = run_at(url, tmp_path / "a")
    for step in (2, 4):
        saved(run, step, keep=1).keep_as(run.checkpoint(step), "best")
    assert steps_of(run) == ["step-00000004"]
    remote, best = RemoteCheckpoints.of(run), run.checkpoints / "best"
    assert remote is not None
    remote.fetch(best)
    assert read_checkpoint(best)[1] == {"step": 4}
    assert len(list((tmp_path / "there").rglob("best/*/rank-00000.safetensors"))) == 1


def test_a_place_that_does_not_answer_is_no_reason_to_go_back(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(run_at(url, tmp_path / "a"), 2, 4)

    def away(*_: object) -> bool:
        raise RemoteStoreError("away")

    monkeypatch.setattr(RemoteStore, "get", away)
    other = run_at(url, tmp_path / "b")
    with pytest.raises(RemoteStoreError):
        loaded(other)
    assert steps_of(other) == ["step-00000002", "step-00000004"]


# ---------------------------------------------------------------------- changes of nodes


def test_a_node_tells_the_driver_all_that_is_new_once(tmp_path: Path) -> None:
    node, driver = RunDir(tmp_path / "n" / "run-1"), RunDir(tmp_path / "d" / "run-1")
    node.create(), driver.create()
    append_line(node.metrics, {"step": 1})
    append_line(driver.metrics, {"step": 1})
    scanner = ChangeScanner(node.path)
    scanner.skip_present()
    assert scanner.next_changes() == []
    append_line(node.metrics, {"step": 2})
    with node.metrics.open("a") as file:
        file.write('{"step": ')  # not all of a line is there yet
    log = node.rank_log(0, 1, 2)
    log.parent.mkdir(parents=True)
    log.write_bytes(b"\xff" * (5 << 20))  # more than goes at once
    FailureRecord("exit", "gone", 3, 1, "n1", rank=2, log=str(log)).write(node, 0)
    while told := scanner.next_changes():
        apply_changes(driver.path, told, append_lines=True)
    with node.metrics.open("a") as file:
        file.write("3}\n")
    apply_changes(driver.path, scanner.next_changes(), append_lines=True)
    assert [json.loads(line)["step"] for line in driver.metrics.read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    assert driver.rank_log(0, 1, 2).read_bytes() == log.read_bytes()
    there = driver.failure(0, 2).read_bytes()
    record = json.loads(failures.with_log_in(driver, there))
    assert record["log"] == str(driver.rank_log(0, 1, 2))
    apply_changes(driver.path, [{"name": "../../escaped", "bytes": b""}])
    assert not (tmp_path / "escaped").exists()


def test_what_a_killed_actor_has_left_is_removed_by_the_next_on_that_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(__file__, "plan.json")
    code = (
        "import os, sys; from dtrain.run.sync import create_local_run_dir;"
        "print(create_local_run_dir('run-1', sys.stdin.buffer.read()));"
        "sys.stdout.flush(); os._exit(1)"
    )
    command = [sys.executable, "-c", code]
    killed = subprocess.run(command, input=buffer.getvalue(), stdout=subprocess.PIPE, check=False)
    left = Path(killed.stdout.decode().strip())
    assert (left / "plan.json").is_file()
    os.utime(left.parent, (1, 1))
    mine = Path(sync.create_local_run_dir("run-1", buffer.getvalue()))
    assert not left.parent.exists()
    os.utime(mine.parent, (1, 1))
    sync._remove_orphans(str(tmp_path))
    assert (mine / "plan.json").is_file()  # its owner lives
    sync.remove_local_run_dir(str(mine))
    assert not list(tmp_path.iterdir())
    for lock in sync._locks:
        assert lock is not None
        os.close(lock)
    sync._locks.clear()


def test_parts_of_ranks_meet_at_the_url(url: str, tmp_path: Path) -> None:
    a, b = run_at(url, tmp_path / "a"), run_at(url, tmp_path / "b")
    part = b.predictions_part(1)
    part.mkdir(parents=True)
    (part / "0").write_bytes(b"rows of rank 1")
    theirs, ours = RemoteRankFiles.of(b, "predictions"), RemoteRankFiles.of(a, "predictions")
    assert theirs is not None
    assert ours is not None
    theirs.upload(part)
    ours.download([a.predictions_part(1)])
    assert (a.predictions_part(1) / "0").read_bytes() == b"rows of rank 1"
    assert not [path for path in (tmp_path / "there").rglob("*") if path.is_file()]


def test_code_travels_as_one_file(tmp_path: Path) -> None:
    job = tmp_path / "job"
    (job / "inner").mkdir(parents=True)
    (job / "job.yaml").touch()
    (job / "inner" / "part.py").write_text("x = 1")
    (job / "big.bin").write_bytes(bytes(2 << 20))  # the copy of the code has a link to it
    run = RunDir(tmp_path / "runs" / "run-1")
    run.create()
    snapshot.copy_tree(job, run, 0)
    plan = cast(LaunchPlan, SimpleNamespace(run=run, attempt=0))
    with raises("ray.code-too-large", "upload_limit: 1.0 MiB", "largest: big.bin"):
        code_archive.pack(plan.run, plan.attempt, 1 << 20, [])
    package = code_archive.pack(plan.run, plan.attempt, 4 << 20, ["*.yaml"])
    assert package.name == "tree-0.tar"
    shutil.rmtree(job)
    found = code_archive.unpack(run)
    assert found is not None
    assert sorted(path.name for path in found.rglob("*.*")) == ["big.bin", "part.py"]
    assert (found / "big.bin").stat().st_size == 2 << 20
    assert not found.is_relative_to(tmp_path / "runs")


@pytest.mark.parametrize(("patient", "tries"), [(False, 2), (True, 3)])
def test_a_checkpoint_waits_longer_for_a_place_that_is_away_than_a_command(
    url: str, monkeypatch: pytest.MonkeyPatch, patient: bool, tries: int
) -> None:
    monkeypatch.setattr(place_module, "_PAUSES_S", (0.0,))
    monkeypatch.setattr(place_module, "_PATIENT_S", (0.0, 0.0))
    place = RemoteStore(url, patient=patient)
    place._is_local = False
    asked: list[str] = []

    def away(path: str, _data: bytes) -> None:
        asked.append(path)
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(place._fs, "pipe_file", away)
    with raises("url.unreachable", "nobody listens"):
        place.write("x", b"")
    assert len(asked) == tries


def test_none_of_several_actions_begins_after_one_has_failed() -> None:
    begun: list[int] = []
    both = threading.Barrier(2, timeout=30)

    def action(number: int) -> None:
        begun.append(number)
        both.wait()  # the first two run at the same time
        raise RemoteStoreError(str(number))

    with pytest.raises(RemoteStoreError):
        at_once(2, action, itertools.count())
    assert sorted(begun) == [0, 1]
