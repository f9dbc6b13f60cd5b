"""The hash seed of a run: each of its interpreters has it, whatever it was started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launch_plan import Facts
from dtrain.run.files import write_json
from dtrain.run.rundir import RunDir

PROGRAM = """
import os, sys
from dtrain.node.hashing import take_hash_seed
from dtrain.run.rundir import RunDir
take_hash_seed(RunDir(sys.argv[1]), sys.orig_argv[1:], keep_fd=int(sys.argv[2]))
os.write(int(sys.argv[2]), repr((os.getpid(), hash("text"), sys.argv)).encode())
"""


def hash_in(run: Path, **environ: str) -> str:
    """Of a text, in an interpreter that writes it to a descriptor and keeps its pid."""
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, run, str(write)],
        env={**os.environ, **environ}, pass_fds=[write],
    ) as process:  # fmt: skip
        os.close(write)
        with open(read) as file:
            pid, found, argv = eval(file.read())
    assert (process.returncode, pid, argv) == (0, process.pid, ["-c", str(run), str(write)])
    return str(found)


def test_an_interpreter_takes_the_seed_of_its_run(tmp_path: Path) -> None:
    for name, seed in {"five": "5", "none": None}.items():
        worker_env = {} if seed is None else {"PYTHONHASHSEED": seed}
        write_json(RunDir(tmp_path / name).plan, {"worker_env": worker_env})
    of_five = {hash_in(tmp_path / "five", PYTHONHASHSEED=own) for own in ("1", "5", "random")}
    assert len(of_five) == 1
    older = {hash_in(tmp_path / run, PYTHONHASHSEED="1") for run in ("none", "no run")}
    assert len(older) == 1
    assert older != of_five


def test_a_user_s_own_seed_is_taken_and_a_resume_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own, taken in {"": "0", "random": "0", "77": "77"}.items():
        monkeypatch.setenv("PYTHONHASHSEED", own)
        assert Facts.gather("run", tmp_path).hash_seed == taken
    write_json(RunDir(tmp_path / "run").plan, {"worker_env": {"PYTHONHASHSEED": "5"}})
    assert Facts.gather("run", tmp_path, attempt=1).hash_seed == "5"
    assert Facts.gather("run", tmp_path).hash_seed == "77"
