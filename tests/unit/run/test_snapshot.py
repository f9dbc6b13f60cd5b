import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dtrain.run import snapshot
from dtrain.run.rundir import RunDir

NAMES = ["plain.py", "with space", "quo'te\"", "semi;colon", "new\nline", "-dash", "é", ":colon"]


def git(where: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "protocol.file.allow=always", "-C", str(where), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _own_git_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text(
        "[user]\nname = t\nemail = t@example.org\n[diff]\nnoprefix = true\nrenames = copies\n"
        "[color]\nui = always\n[core]\nquotePath = true\n"
    )
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with a job in `jobs/one/` and one commit."""
    repo = tmp_path / "re po"
    (repo / "jobs" / "one").mkdir(parents=True)
    (repo / ".gitignore").write_text("*.secret\n/data/\n")
    for name in NAMES:
        (repo / "jobs" / "one" / name).write_text(f"first {name}\n")
    (repo / "raw.bin").write_bytes(bytes(range(256)) * 10)
    git(repo, "init", "-q", "-b", "trunk")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "one")
    return repo


def take(repo: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    folder = tmp_path / "runs" / "one-k3v9ab" / "code"
    shutil.rmtree(folder, ignore_errors=True)
    snapshot.take(repo / "jobs" / "one", RunDir(folder.parent))
    return json.loads((folder / "git.json").read_text()), folder


def tree(root: Path) -> dict[str, Any]:
    """path → (content or link target, is executable) of all files but git's own."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if ".git" in path.relative_to(root).parts or (path.is_dir() and not path.is_symlink()):
            continue
        content = os.readlink(path) if path.is_symlink() else path.read_bytes()
        executable = not path.is_symlink() and os.access(path, os.X_OK)
        found[str(path.relative_to(root))] = (content, executable)
    return found


def rebuilt(repo: Path, record: dict[str, Any], folder: Path, at: Path) -> Path:
    git(repo.parent, "clone", "-q", str(repo), str(at))
    git(at, "checkout", "-q", record["sha"])
    if (folder / "changes.patch").exists():
        git(at, "apply", "--binary", str(folder / "changes.patch"))
    if (folder / "untracked").exists():
        shutil.copytree(folder / "untracked", at, symlinks=True, dirs_exist_ok=True)
    return at


def test_a_clean_tree(repo: Path, tmp_path: Path) -> None:
    record, folder = take(repo, tmp_path)
    assert record == {
        "git": True,
        "sha": git(repo, "rev-parse", "HEAD"),
        "branch": "trunk",
        "dirty": False,
        "job": "jobs/one",
        "job_is_ignored": False,
        "left_out": [],
        "left_out_count": 0,
    }
    assert [path.name for path in folder.iterdir()] == ["git.json"]


def change_everything(repo: Path) -> None:
    one = repo / "jobs" / "one"
    for name in NAMES:
        (one / name).write_text(f"second {name}\n")
        (one / f"new {name}").write_text(f"untracked {name}\n")
    (one / NAMES[1]).unlink()
    (one / NAMES[2]).rename(repo / "moved")
    git(repo, "add", "-A", "moved")
    (repo / "raw.bin").write_bytes(bytes(range(255, -1, -1)) * 10)
    (repo / "run.sh").write_text("#!/bin/sh\n")
    (repo / "run.sh").chmod(0o755)
    (repo / "link").symlink_to("nowhere at all")
    (repo / "staged.py").write_text("a = 1\n")
    git(repo, "add", "staged.py")
    (repo / "staged.py").write_text("a = 2\n")
    (one / "plain.py").chmod(0o755)
    (one / "no end").write_text("no newline at the end")


def test_the_tree_can_be_made_again(repo: Path, tmp_path: Path) -> None:
    change_everything(repo)
    status = git(repo, "status", "--porcelain")
    record, folder = take(repo, tmp_path)
    assert record["dirty"] is True
    assert record["left_out"] == []
    assert tree(rebuilt(repo, record, folder, tmp_path / "again")) == tree(repo)
    assert git(repo, "status", "--porcelain") == status


def test_what_git_ignores_stays_out(repo: Path, tmp_path: Path) -> None:
    (repo / "data").mkdir()
    (repo / "data" / "big").write_text("x")
    (repo / "token.secret").write_text("hunter2")
    record, folder = take(repo, tmp_path)
    assert (record["dirty"], (folder / "untracked").exists()) == (False, False)


def test_an_ignored_job_is_told(repo: Path, tmp_path: Path) -> None:
    (repo / ".gitignore").write_text("/jobs/one\n")
    git(repo, "rm", "-q", "-r", "--cached", "jobs")
    assert take(repo, tmp_path)[0]["job_is_ignored"] is True


def test_runs_are_not_part_of_the_code(repo: Path) -> None:
    (repo / "mine.py").write_text("x")
    for runs, kept in ((repo / "runs", {"mine.py"}), (repo, {"mine.py", "runs/old-aaaaaa/log"})):
        run = runs / "one-k3v9ab"
        for path in (repo / "runs" / "old-aaaaaa" / "log", run / "job.yaml"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        snapshot.take(repo / "jobs" / "one", RunDir(run))
        assert set(tree(run / "code" / "untracked")) == kept
        shutil.rmtree(run)


def test_small_files_first_then_a_list(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_MOST_BYTES", 1000)
    monkeypatch.setattr(snapshot, "_MOST_FILES", 3)
    (repo / "a big one").write_text("x" * 2000)
    (repo / "raw.bin").write_bytes(os.urandom(3000))
    for k in range(4):
        (repo / f"small{k}").write_text("x" * (k + 1))
    record, folder = take(repo, tmp_path)
    assert set(tree(folder / "untracked")) == {"small0", "small1", "small2"}
    assert [(each["path"], each["why"]) for each in record["left_out"]] == [
        ("changes.patch", "too large"),
        ("small3", "over the limit"),
        ("a big one", "over the limit"),
    ]
    assert record["left_out"][2]["bytes"] == 2000
    assert not (folder / "changes.patch").exists()
    monkeypatch.setattr(snapshot, "_MOST_LISTED", 1)
    record, _ = take(repo, tmp_path)
    assert (len(record["left_out"]), record["left_out_count"]) == (1, 3)


def test_before_the_first_commit_and_on_no_branch(tmp_path: Path, repo: Path) -> None:
    new = tmp_path / "new"
    (new / "jobs" / "one").mkdir(parents=True)
    git(new, "init", "-q", "-b", "trunk")
    (new / "a.py").write_text("a = 1\n")
    git(new, "add", "a.py")
    (new / "b.py").write_text("b = 1\n")
    record, folder = take(new, tmp_path)
    assert (record["sha"], record["branch"], record["dirty"]) == (None, "trunk", True)
    assert "+a = 1" in (folder / "changes.patch").read_text()
    assert set(tree(folder / "untracked")) == {"b.py"}
    git(repo, "checkout", "-q", "--detach")
    assert take(repo, tmp_path)[0]["branch"] is None


def test_submodules_do_not_break_the_patch(repo: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init", "-q")
    (library / "lib.py").write_text("x = 1\n")
    git(library, "add", "-A")
    git(library, "commit", "-q", "-m", "lib")
    git(repo, "submodule", "--quiet", "add", str(library), "sub mod")
    git(repo, "commit", "-q", "-m", "sub")
    (repo / "sub mod" / "lib.py").write_text("x = 2\n")
    (repo / "jobs" / "one" / "plain.py").write_text("second\n")
    git(repo, "clone", "-q", str(library), str(repo / "inner"))
    record, folder = take(repo, tmp_path)
    assert [(each["path"], each["why"]) for each in record["left_out"]] == [
        ("sub mod", "changes inside a submodule"),
        ("inner/", "a separate repository"),
    ]
    again = rebuilt(repo, record, folder, tmp_path / "again")
    assert (again / "jobs" / "one" / "plain.py").read_text() == "second\n"


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    (bare / "jobs" / "one").mkdir(parents=True)
    record, folder = take(bare, tmp_path)
    assert record["git"] is False
    assert record["why"].startswith("not a git repository")
    assert [path.name for path in folder.iterdir()] == ["git.json"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert take(bare, tmp_path)[0] == {"git": False, "why": "git is not installed"}


def test_nothing_fails_a_launch(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot.take(tmp_path / "nowhere", RunDir(tmp_path))
    assert json.loads((tmp_path / "code" / "git.json").read_text())["git"] is False
    (tmp_path / "file").write_text("")
    snapshot.take(repo, RunDir(tmp_path / "file" / "run"))
    (repo / "x").write_text("x")
    monkeypatch.setattr(shutil, "copy2", lambda *_, **__: 1 / 0)
    record, _ = take(repo, tmp_path)
    assert (record["dirty"], record["why"]) == (True, "ZeroDivisionError: division by zero")
    assert record["sha"] == git(repo, "rev-parse", "HEAD")


def test_settings_of_a_git_hook_are_not_taken_for_ours(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert take(repo, tmp_path)[0]["git"] is True


SECRET = [
    ".env", ".env.local", "env.local", "prod.env", "server.pem", "aws_credentials", "id_rsa",
    ".pypirc", ".netrc", ".htpasswd", ".aws/config", "deep/.ssh/known_hosts", ".kube/config",
    "kubeconfig", "store.p12", "store.pfx", "my-service-account.json", "secrets.yaml",
    "Secrets.YML", "prod.tfvars", "token.txt",
]  # fmt: skip
PLAIN = ["environment.yml", "keys.py", "secrets.py", "tokens.txt", "config", "monkey.json", "enve"]


def test_files_that_hold_secrets_by_custom_are_named_and_not_copied(
    repo: Path, tmp_path: Path
) -> None:
    for name in [*SECRET, *PLAIN]:
        (repo / "jobs" / name).parent.mkdir(exist_ok=True, parents=True)
        (repo / "jobs" / name).write_text("s3cret")
    record, folder = take(repo, tmp_path)
    inside = folder / "untracked" / "jobs"
    copied = {str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_file()}
    assert copied == set(PLAIN)
    assert {each["why"] for each in record["left_out"]} == {"may hold secrets"}
    assert {each["path"] for each in record["left_out"]} == {f"jobs/{name}" for name in SECRET}
    (event,) = map(json.loads, (folder.parent / "events.jsonl").read_text().splitlines())
    assert event["event"] == "secrets_left_out"
    assert set(event["files"]) == {f"jobs/{name}" for name in SECRET}


def test_nobody_else_looks_into_the_copies(repo: Path, tmp_path: Path) -> None:
    (repo / "jobs" / "one" / "job.yaml").write_text("launch: {env: {MY_TOKEN: s3cret}}")
    (repo / "jobs" / ".env").write_text("s3cret")
    _, folder = take(repo, tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)  # as it was in older runs
    snapshot.copy_tree(repo / "jobs" / "one", RunDir(folder.parent), 0)
    assert folder.stat().st_mode & 0o777 == 0o700
    copy = RunDir(folder.parent).job_code(0)
    assert not (copy / "job.yaml").is_symlink()
    assert (copy.resolve().parent / ".env").is_symlink()
