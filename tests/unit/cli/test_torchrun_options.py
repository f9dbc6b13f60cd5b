"""Every option of torchrun: dtrain has it, or says what to write instead."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from torch.distributed.run import get_args_parser

from dtrain.cli import launch, torchrun
from dtrain.cli.main import main
from dtrain.doctor import gpus
from support import ROOT
from support.errors import assert_shown

DOCS = (ROOT / "docs" / "script.md").read_text()


def options_of_torchrun() -> Iterator[tuple[str, bool]]:
    """Each option, and whether it takes a value."""
    for action in get_args_parser()._actions:
        for name in action.option_strings:
            if name not in ("-h", "--help"):
                yield name, action.nargs != 0


OWN = {name for each in launch.command.params for name in each.opts}


@pytest.mark.parametrize(("name", "has_value"), [*options_of_torchrun()])
def test_it_is_understood_or_answered(
    name: str, has_value: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spelled = name.replace("_", "-")
    assert re.search(rf"`{spelled}[ =`]", DOCS), "docs/script.md has a row for it"
    if spelled in OWN:
        found = next(each for each in launch.command.params if spelled in each.opts)
        assert isinstance(found, click.Option)
        assert found.is_flag != has_value
        return
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("print(1)\n")
    assert torchrun.ANSWERS[spelled].has_value == has_value
    value = ["7"] if has_value else []
    with pytest.raises(SystemExit) as end:
        main(["plan", "--nnodes=1", name, *value, "--nproc_per_node", "2", "train.py", "--lr", "3"])
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert_shown(shown, "usage.option-of-torchrun", spelled)
    line = next(each for each in shown.splitlines() if each.startswith("write: "))
    words = shlex.split(line.removeprefix("write: "))
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    assert end.value.code == 0, "what it says to write is right"
    assert f"program    {tmp_path}/train.py --lr 3\n" in capsys.readouterr().out


def test_all_of_a_command_line_is_answered_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    typed = (
        "launch --nnodes 2 --node-rank 1 --master_addr=head --master-port 12 --rdzv-id x "
        "--tee 3 -m pkg.train --lr 3"
    )
    with pytest.raises(SystemExit):
        main(shlex.split(typed))
    shown = capsys.readouterr().err
    assert_shown(shown, "usage.option-of-torchrun", "--master-addr head", "--tee 3", "--rdzv-id x")
    assert (
        "launch --nnodes 2 --node-rank 1 --run-id x -m --launcher torchrun "
        "--rdzv-endpoint head:12 pkg.train -- --lr 3\n"
    ) in shown


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    shown = capsys.readouterr()
    return shown.out if end.value.code == 0 else shown.err


def test_processes_may_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("print(1)\n")
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(gpus, "installed", lambda: 0)
    for word in ("auto", "cpu"):
        assert f" × {cores} process" in planned(capsys, f"--nproc-per-node={word}", "train.py")
    assert_shown(planned(capsys, "--procs", "gpu", "train.py"), "plan.too-few-gpus", "gpu")
    elsewhere = planned(capsys, "--launcher", "slurm", "--procs", "auto", "train.py")
    assert_shown(elsewhere, "usage.invalid-value", "auto")
    monkeypatch.setattr(gpus, "installed", lambda: 3)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    for word in ("auto", "gpu"):
        assert " × 3 processes = 3 ranks on cuda" in planned(capsys, "--procs", word, "train.py")
    wrong = planned(capsys, "--standalone", "--launcher", "torchrun", "train.py")
    assert_shown(wrong, "usage.flag-without-effect", "--standalone", "torchrun")


@pytest.mark.parametrize(
    ("typed", "code", "names"),
    [
        (("-m", "no.such"), "job.module-not-found", ("no.such",)),
        (("-m", "pkg"), "job.module-not-found", ("pkg", "__main__")),
        (("-m", "pkg/train.py"), "job.module-not-found", ("pkg/train.py", "pkg.train")),
        (("-m", "pkg.wrong"), "job.not-python", ("pkg/wrong.py:1",)),
        (("--no-python", "./none.sh"), "job.command-not-found", ("none.sh",)),
        (("--no-python", "./plain.txt"), "job.command-not-executable", ("plain.txt",)),
        (("-m", "--no-python", "x"), "usage.flag-without-effect", ("-m", "--no-python")),
        (("-m", "pkg.train", "--lr", "3"), "usage.option-of-script", ("--lr", "pkg.train -- --lr")),
    ],
)
def test_a_program_that_is_not_there(
    typed: tuple[str, ...], code: str, names: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("pkg").mkdir()
    for file, text in {"__init__": "", "train": "print(1)\n", "wrong": "def (\n"}.items():
        Path("pkg", f"{file}.py").write_text(text)
    Path("plain.txt").write_text("")
    assert_shown(planned(capsys, *typed), code, *names)
    assert "program    -m pkg.train" in planned(capsys, "-m", "pkg.train")
