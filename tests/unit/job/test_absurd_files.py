"""Job files that no person writes: refused with a place, in little time, memory and text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.errors import JobError
from dtrain.job.load import load_job
from support.launch import TINY

JOB = TINY.read_text()


def bomb() -> Iterator[str]:
    """Lists of the list before: 9 ** 9 values in less than a kilobyte."""
    yield "args:\n  k0: &n0 [x, x, x, x, x, x, x, x, x]"
    for k in range(1, 10):
        yield f"  k{k}: &n{k} [{', '.join([f'*n{k - 1}'] * 9)}]"


def merges(levels: int) -> str:
    lines = [f"  a{k}: &a{k}\n    <<: [*a{k - 1}, *a{k - 1}]" for k in range(1, levels)]
    return "\n".join(["args:", "  a0: &a0 {x: 1}", *lines])


WIDE = ", ".join(f"k{k}: 1" for k in range(9000))
MANY = ", ".join(["*b"] * 9000)
ADDED = {
    "an alias bomb": "\n".join(bomb()),
    "a long text, often": f"args:\n  a: &b {'x' * 100_000}\n  b: [{MANY}]",
    "a wide section, merged often": f"args:\n  b: &b {{{WIDE}}}\n  x:\n    <<: [{MANY}]",
    "a merge that merges itself": "args: &a\n  <<: *a",
    "a long list": "args:\n  x: [" + "1, " * 300_000 + "1]",
    "more than a megabyte": "# " + "x" * 1_000_000,
    "many unknown keys": "".join(f"k{k}: 1\n" for k in range(1000)),
    "a hexadecimal number": "seed: 0x" + "f" * 5000,
    "a binary number": "args: {a: 0b" + "1" * 5000 + "}",
    "a decimal number": "launch: {max_restarts: " + "1" * 5000 + "}",
    "half a character": 'args: {a: "\\ud800"}',
    "a key of half a character": 'args: {"\\ud800": 1}',
    "a deep list": "args: {a: " + "[" * 3000,
    "a key with control characters": '"\\0\\e[31m": 1',
    "a long key": f'"{"k" * 5000}": 1',
    "a long script": f"script: {'n' * 300}.py",
    "a name of two lines": 'args: {}\nname: "a\\nb"',
}


def refusal(path: Path) -> str:
    """Why a job is refused; of bounded length, and printable."""
    with pytest.raises(JobError) as refused:
        load_job(path)
    lines = str(refused.value).splitlines()
    assert all(line.isprintable() and len(line) < 1100 for line in lines)
    assert len(lines) <= 51
    assert lines[0].startswith(f"{path.name}:")
    return str(refused.value)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TINY.with_name("task.py").read_text())
    return tmp_path / "job.yaml"


@pytest.mark.parametrize("what", ADDED)
def test_it_is_refused(job: Path, what: str) -> None:
    job.write_text(f"{JOB}\n{ADDED[what]}\n")
    assert str(job.name) in refusal(job)


def test_merges_that_double_at_each_level_are_read_once_each(job: Path) -> None:
    job.write_text(f"{JOB}\n{merges(40)}\n")
    assert "args.a39: " in refusal(job)  # all were read, and the task takes none of them


def test_the_first_problems_are_shown_and_the_others_counted(job: Path) -> None:
    job.write_text(f"{JOB}\n{ADDED['many unknown keys']}\n")
    assert refusal(job).endswith("\nand 950 more")


@pytest.mark.parametrize("what", ["a pipe", "a device", "a directory", "a loop"])
def test_what_is_no_file_is_not_waited_for(job: Path, what: str) -> None:
    if what == "a pipe":
        os.mkfifo(job)
    elif what == "a directory":
        job.mkdir()
    else:
        job.symlink_to("/dev/zero" if what == "a device" else "job.yaml")
    refusal(job)
