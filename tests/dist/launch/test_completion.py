"""Completion, in the shells themselves: what the Tab key gives on a terminal."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.launch import DTRAIN, TINY

SHELLS = {
    "bash": ["bash", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
SET_UP = {
    "bash": 'eval "$(dtrain completion bash)"; PS1=ready',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(dtrain completion zsh)"; PS1=ready',
}
PATIENCE_S = 30


class Keys:
    """A shell on a terminal: keys are typed, and what it shows is read."""

    def __init__(self, master: int) -> None:
        self._master = master
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until a text is shown that was not there before."""
        deadline, start = time.monotonic() + PATIENCE_S, len(self.shown)
        while text not in self.shown[start:]:
            left = deadline - time.monotonic()
            ready = select.select([self._master], [], [], max(0, left))[0]
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._master, 1 << 16).decode(errors="replace")


@contextmanager
def shell(name: str, folder: Path) -> Iterator[Keys]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "dtrain").write_text(f'#!/bin/sh\nexec {" ".join(DTRAIN)} "$@"\n')
    (programs / "dtrain").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        SHELLS[name], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
        env={**os.environ, "PATH": path, "TERM": "xterm", "HOME": str(folder)},
    )  # fmt: skip
    os.close(theirs)
    keys = Keys(ours)
    try:
        keys.type(f"{SET_UP[name]}\n")
        keys.wait_for("ready")
        yield keys
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        os.close(ours)


@pytest.mark.parametrize("name", list(SHELLS))
def test_the_tab_key_completes(name: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits-7q").mkdir(parents=True)
    (tmp_path / "runs" / "digits-7q" / "resolved.yaml").write_text("")
    shutil.copy(TINY, tmp_path / "job.yaml")
    lines = {
        "dtrain stat\t": "dtrain status ",
        "dtrain why dig\t": "dtrain why digits-7q ",
        "dtrain plan --launcher slu\t": "dtrain plan --launcher slurm ",
        "dtrain plan --set train.epo\t3": "dtrain plan --set train.epochs=3",
        "dtrain plan --launcher slurm -o mem\t1G": "dtrain plan --launcher slurm -o mem=1G",
        "dtrain plan job\t": "dtrain plan job.yaml ",
    }
    with shell(name, tmp_path) as keys:
        for typed, completed in lines.items():
            keys.type(f"{typed}]'\x01echo '[\n")  # with what was completed in quotes
            keys.wait_for(f"[{completed}]")


def test_fish_completes(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "dtrain").write_text(f'#!/bin/sh\nexec {" ".join(DTRAIN)} "$@"\n')
    (tmp_path / "dtrain").chmod(0o755)
    line = "dtrain plan --launcher slurm -o mem"
    done = subprocess.run(
        ["fish", "--no-config", "-c", f'dtrain completion fish | source; complete -C "{line}"'],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["mem="]
