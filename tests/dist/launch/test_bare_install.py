"""The wheel in an environment of its own, with every Python that can be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import JOBS, ROOT
from support.package import built_in


def interpreter(minor: int) -> str | None:
    """A Python that works: on the PATH, or one of pyenv's."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python3.{minor}"), *versions.glob(f"3.{minor}.*/bin/python3.{minor}")]
    for python in filter(None, found):
        if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:
            return str(python)
    return None


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_a_bare_environment_gets_all_that_a_launch_needs(tmp_path: Path, minor: int) -> None:
    """As a user installs it, with all dependencies: a second environment of 5 GB."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"for want of Python 3.{minor}")
    (wheel,) = built_in(tmp_path / "built").glob("*.whl")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    venv = tmp_path / "venv"
    try:
        subprocess.run([python, "-m", "venv", venv], check=True, env=env)
        pip = [venv / "bin" / "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True, env=env)
        shutil.copytree(JOBS / "tiny", tmp_path / "job")
        done = subprocess.run(
            [venv / "bin" / "dtrain", "launch", "--procs", "2", "job.yaml"],
            cwd=tmp_path / "job", env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(venv, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
