"""Every command that README and docs show is run, and prints what they say it prints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import ROOT, warm

DOCUMENTS = (
    "README.md",
    "docs/callbacks.md",
    "docs/checkpoints.md",
    "docs/doctor.md",
    "docs/init.md",
    "docs/job-file.md",
    "docs/launching.md",
    "docs/lightning.md",
    "docs/runs.md",
    "docs/script.md",
    "docs/testing.md",
)

COLD = "README.md"
"""Its commands are a new user's first, and start as theirs do; the others' are warm."""

NOT_RUN = {
    "make demo": "installs from the network; CI runs what it runs",
    "make test": "we are in it",
    "pip install .": "installs from the network; tests/unit/house/test_wheel.py installs the wheel",
    "pip install '.[all]'": "installs from the network",
    "dtrain launch --gpus 4 job.yaml": "needs four GPUs; tests/gpu",
}
TIMEOUT_S = 120
EXIT_CODES = {
    "checkpoint diff": 1,
    "dtrain compare": 1,
    "--set args.misbehave=raise": 1,
    "NCCL_SOCKET_IFNAME=ib7": 1,
    "--set train.epoch=5": 2,
}
"""Of commands that are meant to fail, by a part of them; all others end with 0."""

ELSEWHERE = {"gpu-a": "127.0.0.1"}
"""Hosts of the docs, and who plays them here."""


@dataclass
class Shown:
    """A command, and the lines that follow it."""

    command: str
    output: list[str] = field(default_factory=list)
    together: bool = False
    """Started at the same moment as its neighbours."""


def steps(text: str) -> Iterator[Shown | tuple[str, str]]:
    """The commands of a document, and its files as (path, text), in order."""
    fence = re.compile(r"^(<!-- together -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for together, language, body in fence.findall(text):
        named = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", body)
        if named and language in ("python", "yaml"):
            yield named[1], body
        elif language == "console":
            yield from commands(body, bool(together))


def commands(body: str, together: bool) -> list[Shown]:
    found: list[Shown] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(Shown(line.removeprefix("$ "), together=together))
        else:
            found[-1].output.append(line)
    return found


def commands_before(name: str | None) -> list[Shown]:
    """The commands of all documents before one, or of all."""
    names = DOCUMENTS if name is None else DOCUMENTS[: DOCUMENTS.index(name)]
    found = [step for name in names for step in steps((ROOT / name).read_text())]
    return [step for step in found if isinstance(step, Shown)]


def test_what_is_not_run_is_shown() -> None:
    assert set(NOT_RUN) <= {shown.command for shown in commands_before(None)}
    for document in sorted((ROOT / "docs").glob("*.md")):
        runs_here = f"docs/{document.name}" in DOCUMENTS
        assert runs_here or "```console" not in document.read_text(), document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The repository as far as the documents use it; the digits train for one epoch."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "tests" / "jobs", tmp_path / "tests" / "jobs")
    job = tmp_path / "examples" / "digits" / "job.yaml"
    text = job.read_text()
    assert "epochs: 10\n" in text
    job.write_text(text.replace("epochs: 10\n", "epochs: 1\n"))
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.cold if name == COLD else ()) for name in DOCUMENTS],
)
def test_commands_do_what_is_shown(name: str, folder: Path) -> None:
    skipped = {*NOT_RUN, *(shown.command for shown in commands_before(name))}
    batch: list[Shown] = []
    for step in steps((ROOT / name).read_text()):
        if isinstance(step, tuple):
            path = folder / step[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step[1])
        elif step.command not in skipped:
            batch.append(step)
            if not step.together:
                run(batch, folder)
                batch = []
    run(batch, folder)


def run(batch: list[Shown], folder: Path) -> None:
    """Run commands at the same time, and judge what they print and how they end."""
    with ExitStack() as stack:
        processes = [stack.enter_context(started(shown.command, folder)) for shown in batch]
        for shown, process in zip(batch, processes, strict=True):
            judge(shown, process, folder)


@contextmanager
def started(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command while it runs; killed if it still does at the end."""
    for host, stand_in in ELSEWHERE.items():
        command = command.replace(host, stand_in)
    warmed = [] if warm.is_cold else [str(warm.programs())]
    path = os.pathsep.join([*warmed, str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "COLUMNS": "200", "TRACKER_TOKEN": "not-to-be-seen"}
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def judge(shown: Shown, process: subprocess.Popen[str], folder: Path) -> None:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"no end after {TIMEOUT_S} s: {shown.command}\n{error.output}"
        ) from None
    code = next((code for part, code in EXIT_CODES.items() if part in shown.command), 0)
    assert process.returncode == code, f"{shown.command}\n{output}"
    output = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "gpu-a", output)
    actual = list(normal(output.replace(f"{folder}/", "")))
    expected = list(normal("\n".join(shown.output)))
    pattern = "".join(map(as_pattern, expected))
    if expected and not re.fullmatch(pattern, "".join(line + "\n" for line in actual)):
        told = [f"$ {shown.command}", *actual, "--- but the document says", *expected]
        raise AssertionError("\n".join(told))


def as_pattern(line: str) -> str:
    """A line of a document: … stands for any text, and alone for any lines."""
    if line == "…":
        return r"(?:.*\n)*?"
    return re.escape(line).replace("…", ".*") + r"\n"


def normal(text: str) -> Iterator[str]:
    """Lines without what differs from run to run; a verdict keeps its numbers."""
    in_verdict = False
    for line in text.splitlines():
        in_verdict = in_verdict or line.startswith("FAILED: ")
        line = re.sub(r"\b(digits|tiny)-[a-km-np-z2-9]{6}\b", r"\1-RUN", line)
        line = re.sub(r"\b[0-9a-f]{64}\b", "SHA", line)
        line = re.sub(r"(\.py):\d+ in", r"\1:0 in", line)
        yield line if in_verdict else re.sub(r"\d+(\.\d+)?(e-?\d+)?", "0", line)
