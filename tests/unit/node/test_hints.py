"""What is said of errors that come of being launched, made by the statements that make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.node.hints import hint
from dtrain.run.failures import OtherProcessError, user_frames
from dtrain.run.files import write_json
from dtrain.run.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Of a job beside which there are two files, one of them in the copy of its code."""
    for name in ("job/data/x.csv", "job/large.bin", "copy/data/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return planned(tmp_path, "")


def planned(folder: Path, code_dir: str) -> RunDir:
    run = RunDir(folder / "run")
    plan = {"job_dir": f"{folder}/job", "code_dir": code_dir, "trainer": "native"}
    write_json(run.plan, plan)
    return run


def said_of(code: str, run: RunDir, file: str = "task.py") -> str:
    """Of the error that this file's text raises."""
    path = run.path.parent / "job" / file
    path.write_text(code)
    try:
        exec(compile(code, str(path), "exec"), {"__name__": path.stem, "__package__": ""})
    except Exception as error:
        said = hint(error, user_frames(error.__traceback__), run)
        other = OtherProcessError.of(error)  # as a loader process sends it
        assert not said or hint(other, other.frames, run) == said
        return said
    raise AssertionError("it raises nothing")


def test_a_relative_path_says_which_folder_it_is_looked_up_in(run: RunDir, tmp_path: Path) -> None:
    job, here = tmp_path / "job", os.getcwd()
    found = said_of("open('data/x.csv')", run)
    assert f"looked up in the working directory, {here}, and data/x.csv is in {job}" in found
    assert "Path(__file__).parent / 'data/x.csv'" in found
    lost = said_of("open('lost.csv')", run)
    assert here in lost
    assert f"lost.csv is not in the job's directory {job}" in lost
    wrapped = said_of("raise FileNotFoundError('in a loader: ' + repr('x') + "
                      "\" No such file or directory: 'data/x.csv'\")", run)  # fmt: skip
    assert wrapped == found
    assert said_of("open('/not/there')", run) == ""
    assert said_of("import subprocess\nsubprocess.run(['no-such-program'])", run) == ""


def test_a_file_that_the_copy_of_the_code_lacks(run: RunDir, tmp_path: Path) -> None:
    run = planned(tmp_path, f"{tmp_path}/copy")
    absent = said_of(f"open('{tmp_path}/copy/large.bin')", run)
    assert absent.startswith(f"large.bin is not in the run's copy of the code, but in {tmp_path}")
    assert "Path(__file__).parent" in said_of("open('data/x.csv')", run)
    relative = said_of("open('large.bin')", run)
    assert relative.endswith(f"write the absolute path, {tmp_path}/job/large.bin")


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("from . import helper", "`import helper`"),
        ("from .models import Net, Other", "`from models import Net, Other`"),
        ("from .models import (\n    Net,\n)", "`from models import Net`"),
        ("from .. import helper", "`task: package.module:Class`"),
    ],
)
def test_a_relative_import_says_what_to_write(run: RunDir, line: str, instead: str) -> None:
    found = said_of(line, run, file="net.py")
    assert "net.py is a file of its own, not part of a package" in found
    assert instead in found


def test_other_errors_have_no_hint(run: RunDir) -> None:
    for code in ("import not_there", "raise EOFError('Ran out of input')", "1 / 0"):
        assert said_of(code, run) == ""


def test_shared_memory_that_is_full_is_named(run: RunDir) -> None:
    full = "No space left on device (28)"
    file = "unable to allocate shared memory(shm) for file </torch_9728_744027526_4>"
    assert "/dev/shm" in said_of(f"raise RuntimeError('{file}: {full}')", run)
    assert said_of(f"raise OSError('/data/x: {full}')", run) == ""
