"""The code of runs, as `dtrain.run.snapshot` has kept it: the files that differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dtrain.run import files, snapshot
from dtrain.run.remote.runs import download_snapshot
from dtrain.run.rundir import RunDir
from dtrain.words import numbered

_NOT_IN_GIT = "not in git"
_SHA = re.compile("[0-9a-f]{40,64}")


def differences(runs: Sequence[RunDir], job_dir: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Return what differs in the code, by commit and by file, and notes on what is not known.

    Args:
        runs: the runs.
        job_dir: the directory of a job, whose repository knows what has changed between commits.
    """
    for run in runs:
        download_snapshot(run)
    records = [files.read_json(run.code / "git.json") for run in runs]
    records = [record if isinstance(record, dict) else {} for record in records]
    notes = [
        f"the code of {run.id} is not recorded: {record.get('why', 'it has no git.json')}"
        for run, record in zip(runs, records, strict=True)
        if not record.get("git")
    ]
    for run, record in zip(runs, records, strict=True):
        listed = record.get("left_out")
        left_out = [each.get("path") for each in listed or () if isinstance(each, dict)]
        if left_out:
            notes.append(f"not recorded of {run.id}: {numbered('file', left_out)}")
    known = [_changed(run) for run in runs]
    found: dict[str, list[Any]] = {"commit": [record.get("sha") for record in records]}
    for name in sorted({name for changed in known for name in changed}):
        values = [changed.get(name) for changed in known]
        is_new = any(value is not None and value.startswith(_NOT_IN_GIT) for value in values)
        found[name] = [value or (None if is_new else "as committed") for value in values]
    commits = [sha for sha in dict.fromkeys(map(str, found["commit"])) if _SHA.fullmatch(sha)]
    if len(commits) > 1:
        between = snapshot.changed_between(Path(job_dir), commits)
        if between is None:
            notes.append(f"which files the commits change is not known in {job_dir}")
        elif between:
            notes.append(f"between the commits: {numbered('file', between)}")
    return found, notes


def _changed(run: RunDir) -> dict[str, str]:
    """Return the files that differ from the commit, each with a digest of the change."""
    found: dict[str, str] = {}
    patch = run.code / "changes.patch"
    data = patch.read_bytes() if patch.is_file() else b""
    for part in re.split(rb"^diff --git ", data, flags=re.MULTILINE)[1:]:
        line, _, change = part.partition(b"\n")  # a/NAME b/NAME, perhaps in quotes
        name = line[len(line) // 2 + 1 :].strip(b'"').removeprefix(b"b/")
        found[name.decode(errors="replace")] = f"changed, {_digest(change)}"
    folder = run.code / "untracked"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = f"{_NOT_IN_GIT}, {_digest(path.read_bytes())}"
    return found


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=4).hexdigest()
