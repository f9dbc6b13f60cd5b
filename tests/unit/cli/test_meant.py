"""What a user types who comes from another tool, and what dtrain answers."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dtrain.cli.main import main
from support.errors import assert_shown
from support.launch import TINY


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ls", "runs"), ("ps", "runs"), ("list", "runs"), ("stop", "cancel"), ("kill", "cancel"),
        ("run", "launch"), ("train", "launch"), ("start", "launch"), ("log", "logs"),
        ("help", "--help"), ("show", "status"), ("stauts", "status"),
    ],
)  # fmt: skip
def test_a_command_of_another_tool(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_shown(output(capsys, typed), "usage.unknown-command", repr(typed), repr(meant))


def test_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "launch", "--proc", "2", "job.yaml")
    assert_shown(shown, "usage.unknown-option", "'--proc'", "'--procs'")
    shown = output(capsys, "launch", "job.yaml", "--lr", "3")
    assert_shown(shown, "usage.unknown-option", "'--lr'")
    assert "'--ray'" not in shown, "which is as near as any, and is not meant"


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("train.py --lr 3", "train.py -- --lr 3"),
        ("--procs 2 train.py --lr=3 --out 'a b'", "--procs 2 train.py -- --lr=3 --out 'a b'"),
        ("train.py --procs 2 --learning_rate 3", "train.py --procs 2 -- --learning_rate 3"),
    ],
)
def test_arguments_of_a_script_come_after_two_dashes(
    given: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    shown = output(capsys, "launch", *shlex.split(given))
    assert "  [usage.option-of-script]\n" in shown
    assert shown.splitlines()[1].endswith(f"launch {right}")
    wrong = output(capsys, "launch", "--no-such", "train.py")
    assert "No such option '--no-such'" in wrong, "it is before the script"


def test_version_names_torch_and_python_without_importing_torch() -> None:
    check = (
        "import sys\n"
        "from dtrain.cli.main import cli\n"
        "cli(['--version'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = [f"dtrain {version('dtrain')}", f"torch {version('torch')}"]
    assert done.stdout == ", ".join([*parts, f"Python {platform.python_version()}"]) + "\n"


def test_plan_shows_a_script_and_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("print(1)\n")
    arguments = ["plan", "--env", "CITY=Delft", "train.py"]
    script = ["--lr", "3", "--api-key", "s3cret-s3cret"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *more, "--", *script])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "s3cret-s3cret" not in text
        if more:
            plan = json.loads(text)["plan"]
            assert plan["program"][:3] == [str(tmp_path / "train.py"), "--lr", "3"]
            assert plan["worker_env"]["CITY"] == "Delft"
        else:
            assert f"\nprogram    {tmp_path}/train.py --lr 3 --api-key " in text
            assert "\n  CITY=Delft\n" in text
    with pytest.raises(SystemExit):
        main(["plan", str(TINY)])
    assert "\nprogram " not in capsys.readouterr().out


def test_what_is_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.sh").write_text("python train.py\n")
    first, _ = output(capsys, "launch", "run.sh").splitlines()
    assert first.startswith("dtrain: 'run.sh' ")
    assert first.endswith("  [usage.not-a-job]")
    assert_shown(output(capsys, "verify", "train.py"), "verify.script", "'train.py'")
