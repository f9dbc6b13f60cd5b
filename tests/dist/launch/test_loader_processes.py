"""A loader process that fails ends its run at once, with the sample and the user's line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import JOBS
from support.launch import dtrain, the_run

JOB = JOBS / "loaders" / "job.yaml"
BATCH = "samples 12, 13, 14, 15"


def culprit(folder: Path, where: str, how: str, *flags: str) -> dict[str, Any]:
    """What the verdict says of a launch that fails in this way."""
    given = ("--set", f"args.how={how}", "--set", f"args.where={where}")
    done = dtrain("launch", "--procs", "1", *given, *flags, JOB, cwd=folder, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    record: dict[str, Any] = json.loads(the_run(folder).verdict(0).read_text())["culprit"]
    return record


@pytest.mark.parametrize(
    ("where", "how", "kind", "function", "name"),
    [
        pytest.param(  # whose rank has to end as one does
            "train", "raise", "ValueError", "fail", "sample 13", marks=pytest.mark.cold
        ),
        ("train", "exit", "SystemExit", "fail", "sample 13"),
        ("train", "descriptors", "OSError", "fail", "ulimit -n"),
        ("train", "_exit", "LoaderProcessError", None, BATCH),
        ("eval", "raise", "ValueError", "fail", "sample 13"),
        ("eval", "kill", "LoaderProcessError", None, BATCH),
        ("train", "shape", "RuntimeError", "collate", "sample 13 is torch.float32[2]"),
        ("stream", "raise", "ValueError", "fail", "position 13"),
        ("stream", "kill", "LoaderProcessError", None, "positions 12 to 15"),
        ("collate", "raise", "ValueError", "collate", BATCH),
        ("collate", "lambda", "AttributeError", None, "could not send a batch"),
    ],
)
def test_it_is_reported(
    where: str, how: str, kind: str, function: str | None, name: str, tmp_path: Path
) -> None:
    record = culprit(tmp_path, where, how)
    assert record["type"] == kind, record
    assert name in record["message"], record
    assert function is None or record["frames"][-1]["function"] == function


def test_under_trainer_lightning_too(tmp_path: Path) -> None:
    record = culprit(tmp_path, "eval", "raise", "--trainer", "lightning")
    assert (record["type"], record["frames"][-1]["function"]) == ("ValueError", "fail")


def test_a_long_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    done = dtrain("launch", "--procs", "1", JOB, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
