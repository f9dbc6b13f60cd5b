"""A launch without a stdin, under a locale that has no character beyond ASCII."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.launch import TINY

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT = "naïve 日本"


def dtrain_here(
    folder: Path, *arguments: str, shell: str = 'exec "$@" <&-', env: dict[str, str] = ASCII
) -> subprocess.CompletedProcess[str]:
    """A new interpreter, whose descriptor 0 is closed, or whatever the shell makes of it."""
    command = [sys.executable, "-P", "-m", "dtrain", *arguments]
    return subprocess.run(
        ["sh", "-c", shell, "sh", *command],
        cwd=folder, env={**os.environ, **env}, capture_output=True, encoding="utf-8",
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.cold
def test_the_verdict_is_printed_and_the_run_goes_on(tmp_path: Path) -> None:
    script = f'print("{TEXT}")\nraise ValueError("{TEXT}")\n'
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    (tmp_path / "job.yaml").write_text(f"name: {TEXT}\nscript: train.py\n", encoding="utf-8")
    escaped = TEXT.encode("ascii", "backslashreplace").decode()
    launched = dtrain_here(tmp_path, "launch", "--run-id", "odd", "job.yaml")
    assert launched.returncode == 1, launched.stdout + launched.stderr
    assert "FAILED: rank 0" in launched.stdout
    assert launched.stdout.count(escaped) >= 2  # what the script printed, and the reason
    told = dtrain_here(tmp_path, "why", "odd")
    assert "FAILED: rank 0" in told.stdout, told.stderr
    again = dtrain_here(tmp_path, "resume", "--dry-run", "odd")
    assert (again.returncode, again.stderr) == (0, "")


def test_too_few_descriptors_are_refused(tmp_path: Path) -> None:
    few = 'ulimit -n 16; exec "$@"'
    launched = dtrain_here(tmp_path, "launch", "--run-id", "few", str(TINY), shell=few, env={})
    assert launched.returncode == 1, launched.stdout + launched.stderr
    assert "ulimit -n" in launched.stderr
    state = dtrain_here(tmp_path, "status", "few", shell=few, env={})
    assert "[run.no-runs]" in state.stderr
