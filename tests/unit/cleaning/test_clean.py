"""What is removed, and what never is."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cleaning import finding, removing
from dtrain.cleaning.claim import held
from dtrain.cleaning.finding import Found
from dtrain.cli.main import cli
from dtrain.launchers import status
from dtrain.run import files
from dtrain.run.attempts import Handle, Held
from dtrain.run.remote import runs as remote
from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir
from dtrain.searching.index import entries
from dtrain.train.checkpoint.retention import PIN
from support.checkpoints import save, store
from support.errors import raises
from support.written_runs import end, write_run

OLD = time.time() - 7200


def find(runs: Path, **wanted: Any) -> Found:
    return finding.find(entries(runs), runs, **wanted)


def names(found: Found) -> list[tuple[str, str]]:
    return sorted((item.run, item.name) for item in found.items)


def clean(runs: Path, **wanted: Any) -> dict[str, str]:
    """Remove what is found, and return what could not be."""
    return removing.remove_all(find(runs, **wanted), runs)[1]


def all_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def train(run: RunDir, *steps: int) -> None:
    """Save checkpoints of more steps than the run keeps."""
    for step in steps:
        save(store(run), step, {"weight": torch.ones(2)})


def age(path: Path) -> None:
    os.utime(path, (OLD, OLD))


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a")
    train(run, 12)
    keep = {"code/git.json", "code/tree-2/task.py", "code/job-2", "code/tree-x", ".hidden"}
    for name in keep - {"code/job-2"}:
        files.make_parent(run.path / name)
        (run.path / name).touch()
    run.job_code(2).symlink_to("tree-2")
    before = all_below(run.path)
    unfinished = run.checkpoints / ".step-00000013.aside-0123abcd"
    young = run.path / ".plan.json.17.0123abcd"
    gone = [
        run.secret_env(0),
        run.predictions_part(0),
        unfinished / "rank-00000.safetensors",
        run.code_tree(0) / "task.py",
        run.code_tar(0),
        run.attempt(0) / ".handle.json.0123456789abcdef",
        run.path / ".plan.json.18.0123abcd",
    ]
    for path in (*gone, young):
        files.make_parent(path)
        path.write_text("four")
    for path in gone[-2:]:
        age(path)
    run.job_code(0).symlink_to("tree-0")
    found = find(tmp_path)
    assert names(found) == [
        ("a", ".env-0.json"),
        ("a", ".plan.json.18.0123abcd"),
        ("a", ".predictions"),
        ("a", "attempts/0/.handle.json.0123456789abcdef"),
        ("a", "checkpoints/.step-00000013.aside-0123abcd"),
        ("a", "code/job-0"),
        ("a", "code/tree-0"),
        ("a", "code/tree-0.tar"),
    ]
    assert {item.bytes for item in found.items if item.name != "code/job-0"} == {4}
    assert clean(tmp_path) == {}
    assert all_below(run.path) == before | {young.name}
    assert find(tmp_path).items == []


def test_a_checkpoint_that_was_moved_for_a_moment_is_no_leftover(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a")
    train(run, 12)
    moved = run.checkpoints / ".step-00000012.aside-0123abcd-old"
    run.checkpoint(12).rename(moved)
    assert find(tmp_path).items == []
    shutil.copytree(moved, run.checkpoint(12))
    assert names(find(tmp_path)) == [("a", f"checkpoints/{moved.name}")]


def test_checkpoints_that_a_run_does_not_keep_go(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a")
    train(run, 4, 8, 10, 12)
    files.write_json(run.checkpoint(8) / PIN, {"time": 1.0})
    assert names(find(tmp_path)) == [("a", "checkpoints/step-00000004")]
    assert clean(tmp_path) == {}
    assert sorted(path.name[-2:] for path in run.checkpoints.glob("step-*")) == ["08", "10", "12"]


def test_an_intact_checkpoint_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a")
    train(run, 4, 8, 10, 12)
    for step in (10, 12):
        (run.checkpoint(step) / "rank-00000.safetensors").write_bytes(b"")
    assert names(find(tmp_path)) == [("a", "checkpoints/step-00000004")]
    for step in (4, 8):
        (run.checkpoint(step) / "rank-00000.safetensors").write_bytes(b"")
    found = find(tmp_path)
    assert found.items == []
    assert "a" in found.stays


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs in every state: old ones have ended in 2023, new ones an hour ago."""
    for state in ("succeeded", "failed", "cancelled"):
        write_run(tmp_path, f"old-{state}", state=state)
        write_run(tmp_path, f"new-{state}", state=state, started=time.time() - 3600)
    write_run(tmp_path, "running", state=None)
    return tmp_path


def test_whole_runs_go_only_if_asked_for(runs: Path) -> None:
    everything = all_below(runs)
    assert names(find(runs)) == []
    assert clean(runs) == {}
    assert all_below(runs) == everything
    failed = [("new-failed", ""), ("old-failed", "")]
    old = [("old-cancelled", ""), ("old-failed", ""), ("old-succeeded", "")]
    assert names(find(runs, failed=True)) == failed
    assert names(find(runs, older_than=86400.0)) == old
    assert names(find(runs, failed=True, older_than=86400.0)) == [("old-failed", "")]
    assert clean(runs, failed=True) == {}
    left = {entry.run.id for entry in entries(runs)}
    assert left == {f"{a}-{s}" for a in ("old", "new") for s in ("succeeded", "cancelled")} | {
        "running"
    }
    assert not [*runs.glob(".removed-*")]


def test_what_never_goes(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    pinned = write_run(runs, "pinned")
    train(pinned, 12)
    files.write_json(pinned.checkpoint(12) / PIN, {"time": 1.0})
    damaged = write_run(runs, "damaged")
    damaged.handle(0).write_text("{")
    (runs / "link").symlink_to(write_run(elsewhere, "x").path)
    far = write_run(runs, "far", state=None)  # driven from another host
    handle = json.loads(far.handle(0).read_text())
    files.write_json(far.handle(0), {**handle, "identity": "other-boot/pid:[1]/7/9"})
    needed = write_run(runs, "needed")
    init = {"checkpoint": {"init_from": f"{needed.checkpoints}/step-00000012"}}
    write_run(runs, "user", state=None, job=init)
    for name in ("pinned", "damaged", "far", "needed"):
        (runs / name / ".predictions").mkdir()
    stays = {"pinned", "damaged", "link", "far", "needed", "user", "running"}
    found = find(runs, older_than=0.0)
    assert {*found.stays} == stays
    assert {item.run for item in found.items if item.kind == "run"}.isdisjoint(stays)
    assert {item.run for item in found.items if item.kind == "leftover"} == {"pinned", "needed"}
    assert clean(runs, older_than=0.0) == {}
    assert {entry.run.id for entry in entries(runs)} == stays
    assert (elsewhere / "x" / "plan.json").exists()


def test_runs_that_began_with_the_weights_of_another_are_named(tmp_path: Path) -> None:
    one = write_run(tmp_path, "one")
    write_run(tmp_path, "two", job={"checkpoint": {"init_from": str(one.path)}}, started=OLD)
    (item,) = find(tmp_path, older_than=86400.0).items
    assert item.run == "one"
    assert "two" in item.why


def test_a_run_that_is_resumed_meanwhile_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", state="failed")
    found = find(tmp_path, failed=True)
    Handle.of_this_process("local", 1).claim(run)
    before = all_below(run.path)
    removed, problems = removing.remove_all(found, tmp_path)
    assert (removed, {*problems}) == ([], {"a"})
    end(run, "failed", attempt=1)  # it has failed again, perhaps with a newer checkpoint
    assert {*removing.remove_all(found, tmp_path)[1]} == {"a"}
    assert before <= all_below(run.path)
    assert clean(tmp_path, failed=True) == {}
    assert not run.path.exists()


def test_a_checkpoint_that_is_pinned_meanwhile_stays(tmp_path: Path) -> None:
    one, two = write_run(tmp_path, "one"), write_run(tmp_path, "two", state="failed")
    train(one, 8, 10, 12)
    train(two, 12)
    found = find(tmp_path, failed=True)
    for run, step in ((one, 8), (two, 12)):
        files.write_json(run.checkpoint(step) / PIN, {"time": 1.0})
    removed, problems = removing.remove_all(found, tmp_path)
    assert removed == []
    assert {*problems} == {"one", "two"}
    assert one.checkpoint(8).exists()
    assert two.checkpoint(12).exists()


def test_a_run_that_is_held_cannot_be_resumed(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", state="failed")
    before = all_below(run.path)
    with held(run):
        assert status.state_of(run)[0] == "running"
        with raises("run.held", "a"), held(run):
            pass
        with pytest.raises(Held):
            Handle.of_this_process("local", 1).claim(run)
    assert status.state_of(run)[0] == "failed"
    assert all_below(run.path) == before
    with pytest.raises(RuntimeError), held(run):
        raise RuntimeError
    assert all_below(run.path) == before
    Handle.of_this_process("local", 1).claim(run)


def test_nothing_outside_of_a_run_goes(tmp_path: Path) -> None:
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    linked, run = write_run(runs, "linked"), write_run(runs, "run", state="failed")
    train(linked, 4, 8, 10, 12)
    shutil.move(linked.checkpoints, outside)
    linked.checkpoints.symlink_to(outside)
    (outside / ".step-00000013.aside-0123abcd").mkdir()
    (run.path / "data").symlink_to(outside)
    (run.path / ".predictions").symlink_to(outside)
    before = all_below(outside)
    assert clean(runs) == {}
    assert names(find(runs)) == []
    assert "linked" in find(runs).stays
    assert clean(runs, failed=True) == {}
    assert not run.path.exists()
    assert all_below(outside) == before


def test_the_rest_of_a_removal_that_was_killed_goes(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a")
    run.path.rename(tmp_path / ".removed-a-0123abcd")
    assert entries(tmp_path) == []
    assert names(find(tmp_path)) == [("", ".removed-a-0123abcd")]
    assert clean(tmp_path) == {}
    assert not [*tmp_path.glob(".removed-*")]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a failed run with a checkpoint that was not finished, and of another run."""
    monkeypatch.setenv(remote.STAGING, str(tmp_path / "here"))
    url = f"file://{tmp_path}/bucket"
    for name, state in (("a", "failed"), ("b", "succeeded")):
        run = write_run(remote.staging(url), name, state=state)  # type: ignore[arg-type]
        files.write_atomic(run.url_file, f"{url}/{name}")
        remote.push(run)
        RemoteStore(f"{url}/{name}").write("checkpoints/step-00000012/0123abcd/rank-0", b"four")
    return url


def test_runs_at_a_url(url: str, tmp_path: Path) -> None:
    root = remote.fetch(url)
    part = "checkpoints/step-00000012"
    assert names(find(root)) == [("a", part), ("b", part)]
    found = find(root, failed=True)
    assert names(found) == [("a", ""), ("b", part)]
    size = sum(int(info["size"]) for info in RemoteStore(f"{url}/a").files().values())
    assert sorted(item.bytes for item in found.items) == [4, size]
    assert removing.remove_all(found, root)[1] == {}
    assert {name.split("/")[0] for name in RemoteStore(url).files()} == {"b"}
    assert "checkpoints" not in " ".join(RemoteStore(f"{url}/b").files())
    assert [entry.run.id for entry in entries(remote.fetch(url))] == ["b"]
    assert status.state_of(RunDir(root / "b"))[0] == "succeeded"


def test_a_run_that_another_host_resumes_stays_at_its_url(url: str) -> None:
    found = find(remote.fetch(url), failed=True)
    RemoteStore(f"{url}/a").create_exclusive(
        "attempts/1/handle.json", json.dumps(vars(Handle.of_this_process("local", 1))).encode()
    )
    removed, problems = removing.remove_all(found, remote.staging(url))
    assert [item.run for item in removed] == ["b"]
    assert {*problems} == {"a"}
    assert "a/plan.json" in RemoteStore(url).files()
    assert "a/attempts/1/handle.json" in RemoteStore(url).files()


def command(*arguments: str) -> int:
    return int(cli.main(["clean", *arguments], standalone_mode=False) or 0)


def test_the_command_shows_what_would_go(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--runs", str(runs))
    assert command(*where, "--failed", "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {item["run"] for item in shown["found"]} == {"old-failed", "new-failed"}
    assert (shown["removed"], shown["bytes"]) == ([], 0)
    with raises("usage.not-confirmed", "--yes"):
        command(*where, "--failed")
    with raises("usage.invalid-value", "'30'"):
        command(*where, "--older-than", "30", "--dry-run")
    assert len(entries(runs)) == 7
    assert command(*where, "--failed", "--yes") == 0
    assert "old-failed" in capsys.readouterr().out
    assert len(entries(runs)) == 5
