"""A launch without a stdin, under a locale that has no character beyond ASCII."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT = "naïve 日本"


def dtrain_here(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter, whose descriptor 0 is closed."""
    command = [sys.executable, "-P", "-m", "dtrain", *arguments]
    return subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command],
        cwd=folder, env={**os.environ, **ASCII}, capture_output=True, encoding="utf-8",
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
