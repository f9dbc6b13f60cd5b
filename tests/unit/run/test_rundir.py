"""The run directory: names, atomic files, runs found by what people type."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dtrain.run import files, ids, lookup
from dtrain.run.rundir import RunDir
from support.errors import raises

HOSTILE = ["plain", "with space", "quo'te\"s", "semi;colon", "$(echo hi)", "new\nline"]


def make(root: Path, name: str) -> RunDir:
    run = RunDir(root / name)
    run.create()
    run.resolved.write_text("name: x\n")
    return run


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders(tmp_path: Path, name: str) -> None:
    run = make(tmp_path / name, "digits-abc234")
    files.write_json(run.handle(0), {"a": 1})
    assert files.read_json(run.handle(0)) == {"a": 1}
    assert lookup.find_run("digits", tmp_path / name).path == run.path


def test_found_by_id_prefix_path_and_last(tmp_path: Path) -> None:
    first = make(tmp_path, "digits-aaa222")
    second = make(tmp_path, "digits-aab222")
    third = make(tmp_path, "text-ccc222")
    assert lookup.find_run("digits-aaa222", tmp_path).path == first.path
    assert lookup.find_run("text", tmp_path).path == third.path
    assert lookup.find_run(str(second.path), "elsewhere").path == second.path
    with raises("run.ambiguous", "2 runs: digits-aaa222, digits-aab222"):
        lookup.find_run("digits", tmp_path)
    with raises("run.not-found", "'nix'"):
        lookup.find_run("nix", tmp_path)
    with raises("run.no-runs"):
        lookup.find_run("last", tmp_path / "empty")


def test_last_is_the_one_started_last(tmp_path: Path) -> None:
    first, second = make(tmp_path, "a-222222"), make(tmp_path, "b-222222")
    os.utime(second.resolved, (1, 1))
    assert lookup.find_run("last", tmp_path).path == first.path


def test_an_id_is_not_taken_for_a_prefix_of_another(tmp_path: Path) -> None:
    exact = make(tmp_path, "job")
    make(tmp_path, "job-2")
    assert lookup.find_run("job", tmp_path).path == exact.path


def test_atomic_writes_never_show_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "a" * 100_000)
    stop = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            text = path.read_text()
            seen.add(text[:1] if len(text) == 100_000 and len(set(text)) == 1 else "torn")

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "bcdefghij" * 3:
        files.write_atomic(path, letter * 100_000)
    stop.set()
    reader.join()
    assert "torn" not in seen
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_lines_cut_short_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    files.append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": ')
    assert list(files.read_lines(path)) == [{"a": 1}]
    assert list(files.read_lines(tmp_path / "none")) == []


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises("launch.not-writable", "file/run", "--runs DIR"):
        RunDir(tmp_path / "file" / "run").create()


def test_run_ids_are_short_and_different() -> None:
    made = {ids.new("My Job: №1!") for _ in range(50)}
    assert len(made) == 50
    assert all(name.startswith("my-job-1-") and len(name) == 15 for name in made)
    assert ids.new("***").startswith("run-")
