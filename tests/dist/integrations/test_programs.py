"""Scripts, modules and other programs: each as torchrun starts it, with dtrain around it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from dtrain.integrations.script.command import _copy
from dtrain.run import failures
from support import JOBS, ROOT
from support.errors import assert_named
from support.launch import alive, dtrain, events, started, the_run, wait_for

PROGRAMS = JOBS / "programs"
EXAMPLE = ROOT / "examples" / "script"
HERE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the programs, in which runs may be made."""
    return Path(shutil.copytree(PROGRAMS, tmp_path / "project"))


def seen(folder: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "program",
    [("package/alone.py",), ("-m", "package.train"), ("--no-python", "./train.sh")],
    ids=["script", "module", "command"],
)
def test_it_sees_what_it_sees_under_torchrun(project: Path, program: tuple[str, ...]) -> None:
    """The variables, the command line, the directories, and the way it was imported."""
    text = (project / "package" / "train.py").read_text()
    (project / "package" / "alone.py").write_text(text.replace("from .beside", "from beside"))
    arguments = ("--", "a b", "--", "-x")  # torchrun passes the first -- on
    torchrun = ("torchrun", "--nproc-per-node", "2", *program, "torchrun", *arguments)
    under = subprocess.run(
        torchrun, cwd=project, env={**os.environ, **HERE, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert under.returncode == 0, under.stderr
    flags = ("--nproc_per_node=2", "--standalone")
    done = dtrain("launch", *flags, *program, "--", "dtrain", *arguments, cwd=project, env=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks together: 2, arguments ['--', 'a b', '--', '-x']" in done.stdout
    for ours, theirs in zip(seen(project / "dtrain"), seen(project / "torchrun"), strict=True):
        assert ours["argv"][1:] == ["dtrain", *arguments]
        for each in (ours, theirs):
            del each["argv"][1]
            each["argv"][0] = str(project / each["argv"][0])  # the job's, so it is absolute
        assert ours == theirs
    if program[0] == "--no-python":
        assert done.stdout.count("loading") == 1, "a bar is one line"
        assert "loading: 100%\n" in done.stdout


@pytest.mark.parametrize("way", ["module", "command"])
def test_checkpoint_sampler_and_check_keep_their_promises(tmp_path: Path, way: str) -> None:
    """As in a script: each sample once after a crash in the middle of an epoch."""
    program: dict[str, Any] = {"module": "train", "command": [sys.executable, "train.py"]}
    shutil.copy(EXAMPLE / "train.py", tmp_path)
    launch = {"procs_per_node": 2, "max_restarts": 1}
    job = {"name": way, way: program[way], "launch": launch}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    crash = ("--", "--epochs", "2", "--crash-at", "15")
    done = dtrain("launch", "job.yaml", *crash, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    reason = "ended with code 1" if way == "command" else "a crash on purpose at step 15"
    assert reason in done.stdout
    assert "epoch 2: 9" in done.stdout  # in per cent
    run = the_run(tmp_path)
    assert [event["step"] for event in events(run, "resumed")] == [10]
    # 23 steps an epoch, each sample once: 10 came before the crash, 13 after
    assert [event["step"] for event in events(run, "checkpoint_saved")][-1] == 2 * 23


def test_a_program_that_fails_has_a_verdict_of_its_last_lines(project: Path) -> None:
    command = ("--no-python", "./train.sh", "--", "out", "fail")
    done = dtrain("launch", "--procs", "2", *command, cwd=project, env=HERE)
    assert done.returncode == 3
    assert "rank 1 on node 0" in done.stdout
    assert_named(done.stdout, ["code 3", "[failure.exit]", "no such file: corpus.txt"])
    assert done.stdout.count("loading: 100%") == 2, "of rank 0, and in the verdict"
    assert "10%" not in done.stdout
    again = dtrain("resume", "--max-restarts", "1", cwd=project, env=HERE)
    assert again.returncode == 0, again.stdout
    assert "no such file: corpus.txt" in (the_run(project).rank_logs(1)[1][1]).read_text()


def test_a_program_that_a_signal_ends_ends_the_rank(project: Path) -> None:
    command = ("--no-python", "./train.sh", "--", "out", "segfault")
    done = dtrain("launch", "--procs", "2", *command, cwd=project, env=HERE)
    assert done.returncode == 128 + 11
    assert_named(done.stdout, ["rank 1", "SIGSEGV", "[failure.signal]"])


def test_a_program_and_its_children_end_with_the_launch(tmp_path: Path) -> None:
    """Stopped, and killed: the shell waits for its child and would not pass a signal on."""
    (tmp_path / "waits.sh").write_text("#!/bin/sh\nsleep 600 & echo $! > pid; echo up; wait; :\n")
    (tmp_path / "waits.sh").chmod(0o755)
    for end in ("cancel", "kill"):
        with started("launch", "--no-python", "./waits.sh", cwd=tmp_path) as process:
            assert any("up" in line for line in process.stdout or ())
            pid = int((tmp_path / "pid").read_text())
            if end == "cancel":
                assert dtrain("cancel", "last", cwd=tmp_path).returncode == 0
            else:
                process.kill()
            process.communicate(timeout=60)
        assert wait_for(lambda at=pid: not is_running(at), 10), end


def is_running(pid: int) -> bool:
    import psutil

    try:
        return alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "program", [("reports.py",), ("--no-python", sys.executable, "reports.py")], ids=["own", "no"]
)
def test_an_error_that_a_program_has_recorded_is_the_verdict(
    tmp_path: Path, program: tuple[str, ...]
) -> None:
    """`record` of torch writes it; what the process did afterwards is not the cause."""
    (tmp_path / "reports.py").write_text(
        "import os\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\n"
        "def main():\n"
        "    if os.environ['RANK'] == '1': raise KeyError('no such column')\n"
        "try: main()\n"
        "except KeyError: os._exit(7)\n"
    )
    done = dtrain("launch", "--procs", "2", *program, cwd=tmp_path)
    assert done.returncode == 7, done.stdout
    assert_named(done.stdout, ["rank 1", "KeyError", "no such column", "[failure.exception]"])
    assert "reports.py:5 in main" in done.stdout


def test_a_late_import_of_torch_is_as_quick_as_an_early_one(tmp_path: Path) -> None:
    """The rank's process has it from the start, though the script does not know."""
    (tmp_path / "late.py").write_text(
        "import sys\n"
        "had = 'torch' in sys.modules\n"
        "def main():\n"
        "    import torch._dynamo\n"
        "    print('had torch', had)\n"
        "main()\n"
    )
    done = dtrain("launch", "late.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "had torch True" in done.stdout


def test_the_last_lines_of_stderr_are_whole_however_they_were_written() -> None:
    """Python writes a traceback in many small parts."""
    reads, writes = os.pipe()
    tail, text = bytearray(), b"a line\n" * 20
    with os.fdopen(reads, "rb") as stderr:
        reader = threading.Thread(target=_copy, args=(stderr, tail))
        reader.start()
        for at in range(len(text)):
            os.write(writes, text[at : at + 1])
        os.close(writes)
        reader.join(30)
    assert bytes(tail) == text


def test_what_an_error_file_may_hold(tmp_path: Path) -> None:
    """Any program may write it."""
    path = tmp_path / "error.json"
    where = {"rank": 0, "node_rank": 0, "restart": 0, "log": ""}
    assert failures.of_error_file(path, 1, **where) is None
    trace = 'Traceback:\n  File "/a/b.py", line 3, in f\n    g()\nValueError: no\n'
    for text, expected in (
        ("", None), ("[]", None), ("{}", None), ('{"message": {}}', None), ("[" * 100_000, None),
        ('{"message": "plain text"}', ("an error", "plain text", [])),
        ('{"message": {"message": "ValueError: no", "extraInfo": null}}', ("ValueError", "no", [])),
        (json.dumps({"message": {"message": "E: no", "extraInfo": {"py_callstack": trace}}}),
         ("E", "no", [("/a/b.py", 3, "f", "g()")])),
    ):  # fmt: skip
        path.write_text(text)
        found = failures.of_error_file(path, 4, **where)
        if expected is None:
            assert found is None, text
            continue
        assert found is not None
        frames = [(each.file, each.line, each.function, each.code) for each in found.frames]
        assert (found.type, found.message, frames) == expected
        assert found.exit_code == 4
    assert failures.of_error_file(path, -11, **where) is None, "it ended for another reason"
