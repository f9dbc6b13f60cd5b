"""The code of a run, kept with it: commit, uncommitted changes, untracked files.

`git checkout SHA`, `git apply changes.patch` and a copy of `untracked/` restore the tree.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from dtrain.run import events, files
from dtrain.run.rundir import RunDir

_MOST_BYTES = 50_000_000
_MOST_FILES = 5_000
_MOST_LISTED = 1_000
_LARGE = 1_000_000
_GIT_TIMEOUT_S = 30
_SECRET = "may hold secrets"
# Files that hold secrets by custom, by their name or that of a directory that contains them: a run
# directory is shared with more people than a home is.
_SECRET_FILES = (
    ".env", ".env.*", "*.env", ".envrc", "env.local",
    ".netrc", "_netrc", ".pypirc", ".npmrc", ".htpasswd", ".pgpass", ".my.cnf", ".git-credentials",
    ".dockercfg", ".aws", ".ssh", ".kube", ".gnupg", ".docker/config.json", ".secrets",
    "kubeconfig*", "*.kubeconfig", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks",
    "*.keystore", "*.kdbx", "*.ppk", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*.tfvars", "*.tfvars.json", "*.tfstate",
    "*service-account*.json", "*service_account*.json", "client_secret*.json", "secret.y*ml",
    "secrets.y*ml", "secrets.json", "secrets.toml", "token.txt", "*.token", "*credentials*",
)  # fmt: skip
# Independent of the user's settings: a patch that `git apply` accepts, of this repository only.
_DIFF = (
    "diff",
    "--binary",
    "--full-index",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--no-renames",
    "--no-relative",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--submodule=short",
    "--ignore-submodules=dirty",
)


class _GitFailed(Exception):
    """git gives no answer. The text is the reason."""


def take(job_dir: str | os.PathLike[str], run: RunDir) -> None:
    """Write `git.json`, `changes.patch` and `untracked/` for the repository that contains a job.

    This never fails a launch. An error is recorded in `git.json` under `why`, after the facts found
    before it.

    Args:
        job_dir: the job file's directory.
        run: the run to write to. Its directory is not part of the snapshot.
    """
    record: dict[str, Any] = {"git": False}
    try:
        _fill(record, Path(job_dir).resolve(), run.code)
    except _GitFailed as error:
        record["why"] = str(error)
    except Exception as error:  # a run without its code's record is better than no run
        record["why"] = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        make_private(run.code)
        files.write_json(run.code / "git.json", record)
    secret = [each["path"] for each in record.get("left_out", []) if each["why"] == _SECRET]
    if secret:
        events.note_event(run, "secrets_left_out", files=secret)


def make_private(folder: Path) -> None:
    """Make a directory that only its owner can read: the job's own file may hold secrets too."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def _may_be_secret(path: str) -> bool:
    parts = path.lower().split("/")
    steps = [*parts, "/".join(parts[-2:])]
    return any(fnmatch(step, pattern) for step in steps for pattern in _SECRET_FILES)


def changed_between(folder: Path, commits: Sequence[str]) -> list[str] | None:
    """Return the files in which commits differ from the first one. None if git has no answer."""
    found: set[str] = set()
    try:
        for commit in commits[1:]:
            names = _git(
                folder, "diff", "--no-ext-diff", "--name-only", "-z", commits[0], commit, "--"
            )
            found |= {os.fsdecode(name) for name in names.split(b"\0") if name}
    except (_GitFailed, OSError, ValueError):  # for example a path with a null byte
        return None
    return sorted(found)


def copy_tree(job_dir: str | os.PathLike[str], run: RunDir, attempt: int) -> None:
    """Copy the code around a job as it is now, for a job that starts later: `RunDir.code_tree`.

    The copy has the repository's files that git does not ignore. Without git, it has those of the
    job's directory. A file that is large, or over the limits, becomes a link to the original: it is
    data, which no edit changes. A file that may hold secrets becomes a link too.

    Raises:
        OSError: it cannot be written.
    """
    source = Path(job_dir).resolve()
    tree = run.code_tree(attempt)
    shutil.rmtree(tree, ignore_errors=True)
    make_private(run.code)
    try:
        top = Path(os.fsdecode(_git(source, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
        listed = _git(top, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
        paths = sorted({os.fsdecode(path) for path in listed.split(b"\0") if path})
    except _GitFailed:
        top, paths = source, sorted(_walk(source))
    runs = run.path.resolve().parent
    room = _MOST_BYTES
    (tree / source.relative_to(top)).mkdir(parents=True)
    for number, path in enumerate(paths):
        original = top / path
        if original.is_relative_to(runs) or not os.path.lexists(original):
            continue
        size = _size(original)
        keep = original.is_file() and size <= (room if original.suffix == ".py" else _LARGE)
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        if keep and number < _MOST_FILES and size <= room and not _may_be_secret(path):
            shutil.copy2(original, tree / path)
            room -= size
        else:
            (tree / path.rstrip("/")).symlink_to(original)
    link = run.job_code(attempt)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.join(tree.name, os.path.relpath(source, top)))


def _walk(source: Path) -> Iterable[str]:
    """Yield the files below a directory, without hidden ones, caches and virtual environments."""
    for here, folders, names in os.walk(source):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__pycache__"))
            and not os.path.exists(os.path.join(here, name, "pyvenv.cfg"))
        ]
        yield from (os.path.relpath(os.path.join(here, name), source) for name in names)


def _fill(record: dict[str, Any], job_dir: Path, folder: Path) -> None:
    top = Path(os.fsdecode(_git(job_dir, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
    sha = _one_line(top, "rev-parse", "--verify", "--quiet", "HEAD")
    record |= {
        "git": True,
        "sha": sha,
        "branch": _one_line(top, "symbolic-ref", "--short", "--quiet", "HEAD"),
        "job": os.path.relpath(job_dir, top),
        "job_is_ignored": _one_line(top, "check-ignore", "--", str(job_dir)) is not None,
    }
    make_private(folder)
    left_out = _write_patch(top, sha, folder / "changes.patch")
    changed = bool(left_out) or (folder / "changes.patch").exists()
    submodules = _dirty_submodules(top)
    untracked = _untracked(top, job_dir, folder)
    record["dirty"] = changed or bool(untracked) or bool(submodules)
    left_out += [{"path": path, "why": "changes inside a submodule"} for path in submodules]
    left_out += _copy(top, untracked, folder / "untracked")
    record |= {"left_out": left_out[:_MOST_LISTED], "left_out_count": len(left_out)}


def _write_patch(top: Path, sha: str | None, patch: Path) -> list[dict[str, Any]]:
    """Write the difference from the commit. A patch that is too large is left out."""
    base = sha or _git(top, "hash-object", "-t", "tree", "/dev/null").decode().strip()
    with patch.open("wb") as file:
        _git(top, *_DIFF, base, stdout=file)
    size = patch.stat().st_size
    if 0 < size <= _MOST_BYTES:
        return []
    patch.unlink()  # `git apply` refuses an empty patch
    return [{"path": patch.name, "bytes": size, "why": "too large"}] if size else []


def _untracked(top: Path, job_dir: Path, folder: Path) -> list[str]:
    """Return files that git neither knows nor ignores, without those of runs."""
    runs = folder.resolve().parents[1]
    own = folder.resolve().parent if job_dir.is_relative_to(runs) else runs
    listed = _git(top, "ls-files", "--others", "--exclude-standard", "-z").split(b"\0")
    paths = [os.fsdecode(path) for path in listed if path]
    return [path for path in paths if not (top / path).is_relative_to(own)]


def _copy(top: Path, paths: Iterable[str], target: Path) -> list[dict[str, Any]]:
    """Copy files, small ones first, up to the limits. Return the others."""
    left_out: list[dict[str, Any]] = []
    sized = sorted((_size(top / path), path) for path in paths)
    room, count = _MOST_BYTES, 0
    for size, path in sized:
        why = ""
        if path.endswith("/"):
            why = "a separate repository"
        elif _may_be_secret(path):
            why = _SECRET
        elif size > room or count >= _MOST_FILES:
            why = "over the limit"
        else:
            try:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(top / path, target / path, follow_symlinks=False)
            except OSError as error:
                why = error.strerror or str(error)
        if why:
            left_out.append({"path": path, "bytes": size, "why": why})
        else:
            room, count = room - size, count + 1
    return left_out


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _dirty_submodules(top: Path) -> list[str]:
    """Return submodules with their own changes, which the patch does not hold."""
    status = _git(top, "status", "--porcelain=v2", "-z", "--untracked-files=no")
    found = []
    for entry in status.split(b"\0"):
        # 1 XY S<commit><modified><untracked> <modes and hashes> path
        fields = entry.split(b" ", 8)
        is_submodule = len(fields) == 9 and fields[0] == b"1" and fields[2].startswith(b"S")
        if is_submodule and fields[2][2:] != b"..":
            found.append(os.fsdecode(fields[8]))
    return found


def _one_line(where: Path, *arguments: str) -> str | None:
    """Return the answer of a git command. None when it has none."""
    try:
        return os.fsdecode(_git(where, *arguments)).removesuffix("\n")
    except _GitFailed:
        return None


def _git(where: Path, *arguments: str, stdout: IO[bytes] | int = subprocess.PIPE) -> bytes:
    """Run a git command that reads. Raise `_GitFailed` when it cannot be run or fails."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")
    }
    env |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}  # a launch never holds the user's index lock
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(where), *arguments]
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise _GitFailed("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise _GitFailed(f"git {arguments[0]} took more than {_GIT_TIMEOUT_S} s") from None
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise _GitFailed(message.removeprefix("fatal: ") or f"git {arguments[0]} failed")
    return done.stdout or b""
