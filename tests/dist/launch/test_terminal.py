"""What a person sees on a terminal: lines, a progress bar below, and nothing of it in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from support.launch import DTRAIN, TINY

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(columns: int, *arguments: str, cwd: Path, **env: str) -> tuple[int, str]:
    """Run a command with a terminal of its own; its exit code and all that it printed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*DTRAIN, *arguments], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **env},
    )  # fmt: skip
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 1 << 16):
            chunks.append(chunk)
    except OSError:
        pass  # the other end is closed: the process has ended
    os.close(ours)
    return process.wait(30), b"".join(chunks).decode(errors="replace")


@pytest.mark.parametrize("columns", [80, 200])
def test_a_progress_bar_that_fits(tmp_path: Path, columns: int) -> None:
    code, raw = on_a_terminal(
        columns, "launch", "--procs", "2", "--set", "args.pause=0.05", str(TINY), cwd=tmp_path
    )
    assert code == 0, raw
    text = ESCAPES.sub("", raw).replace("\r", "\n")
    bars = [line for line in text.split("\n") if "━" in line or re.search(r"step +\d+/12 ", line)]
    assert any("loss" in line and "samples/s" in line for line in bars)
    assert all("ETA" in line for line in bars if "━" in line)
    assert max(len(line) for line in bars if "━" in line) <= min(columns, 100)
    # the first and the last: between them the bar shows the steps
    assert re.findall(r"^step (\d+)/12 epoch", text, re.MULTILINE) == ["1", "12"]
    assert "succeeded in" in text


def test_no_colour_when_asked(tmp_path: Path) -> None:
    code, raw = on_a_terminal(80, "launch", "--procs", "1", str(TINY), cwd=tmp_path, NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", raw), "a colour in spite of NO_COLOR"


def test_a_failure_and_states_have_colours_and_fit(tmp_path: Path) -> None:
    arguments = ("--procs", "2", "--set", "args.misbehave=raise", str(TINY))
    code, raw = on_a_terminal(80, "launch", *arguments, cwd=tmp_path)
    assert code == 1
    assert "\x1b[31mFAILED: \x1b[0mrank 1 on node 0" in raw
    for command in ("why", "status", "runs"):
        _, raw = on_a_terminal(80, command, cwd=tmp_path)
        assert "\x1b[31m" in raw, command
        assert "…" not in raw
        lines = ESCAPES.sub("", raw).splitlines()
        assert max(len(line) for line in lines if "/" not in line) <= 80, lines
        _, raw = on_a_terminal(80, command, cwd=tmp_path, NO_COLOR="1")
        assert "\x1b" not in raw, command


@pytest.mark.parametrize("columns", [40, 200])
def test_bars_that_a_script_draws_move_and_are_one_line_in_the_end(
    tmp_path: Path, columns: int
) -> None:
    (tmp_path / "train.py").write_text(
        "import time\n"
        "from tqdm import tqdm\n"
        "for epoch in range(2):\n"
        "    for _ in tqdm(range(20), desc=f'epoch {epoch} of a training'):\n"
        "        time.sleep(0.1)\n"
        "    print('loss', epoch)\n"
    )
    code, raw = on_a_terminal(columns, "launch", "train.py", cwd=tmp_path)
    assert code == 0, raw
    drawn = [ESCAPES.sub("", each) for each in re.split(r"[\r\n]+", raw)]
    drawn = [line for line in drawn if line]
    moving = {line for line in drawn if re.match(r"epoch 0 of a training: ", line)}
    assert len(moving) > 3, "it moves"
    assert [line for line in moving if " 100%" not in line and len(line) > columns] == []
    done = [line for line in drawn if re.search(r"100%\|.*\| 20/20 ", line)]
    assert [line.split()[1] for line in done] == ["0", "1"]
    assert drawn.index("loss 0") > drawn.index(done[0])
