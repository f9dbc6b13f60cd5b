"""Modules in the current directory: which a launch runs, and which the user's code finds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT
from support.launch import TINY

NAMES = (
    "code", "copy", "dtrain", "inspect", "json", "logging", "numbers", "numpy", "profile", "queue",
    "random", "select", "signal", "statistics", "string", "tempfile", "token", "torch", "types",
    "yaml",
)  # fmt: skip


@pytest.mark.cold  # a warm process has imported the right ones already
def test_a_launch_runs_none_of_them_but_those_that_the_user_names(tmp_path: Path) -> None:
    """Nor is it a hindrance that the job is in that directory, too."""
    for file in (TINY, TINY.with_name("task.py")):
        shutil.copy(file, tmp_path)
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open('ran', 'a').write('{name} ')")
    (tmp_path / "mine.py").write_text("open('mine', 'a').write('imported')")
    command = [sys.executable, "-P", "-m", "dtrain", "launch", "--procs", "2"]
    done = subprocess.run(
        [*command, "--set", "launch.preload=[mine]", "job.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert (tmp_path / "mine").read_text() == "imported"


def test_no_process_of_ours_imports_from_the_folder_that_it_is_started_in() -> None:
    """Each is `python -P -m …`, by every launcher. A module of the user's is another matter."""
    of_user = ("job.module", "spec.script_args", '"--module"')
    starts = [
        line.strip()
        for path in (ROOT / "src").rglob("*.py")
        for line in path.read_text().splitlines()
        if '"-m", ' in line and not any(word in line for word in of_user)
    ]
    assert len(starts) > 10
    assert not [line for line in starts if '"-P", "-m"' not in line]
