"""What no flag can mean: exit code 2 and a line that names the flag, from every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.cli.main import main
from support.launch import TINY

Say = Callable[..., str]
ODD_IDS = ("", "a\ntouch PWNED\n", "a\x00b", "-rf", ".hidden", "a/b", "last", "é" * 101, "\udcff")


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Say:
    """Run a command that must be refused; what it says on stderr, which is short and printable."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        said = capsys.readouterr()
        assert end.value.code == 2, said
        assert said.err.replace("\n", "").isprintable(), said.err
        assert len(said.err) < 2000
        assert not list(tmp_path.iterdir())
        return said.err

    return run


@pytest.mark.parametrize("run_id", ODD_IDS)
@pytest.mark.parametrize("command", ["launch", "plan"])
def test_no_run_has_such_an_id(refused: Say, command: str, run_id: str) -> None:
    assert "--run-id" in refused(command, "--run-id", run_id, str(TINY))


@pytest.mark.parametrize("run_id", ODD_IDS)
@pytest.mark.parametrize("command", ["status", "logs", "why", "cancel", "resume", "export"])
def test_no_run_is_found_by_it(refused: Say, command: str, run_id: str) -> None:
    to = ("--to", "onnx") if command == "export" else ()
    refused(command, *to, "--", run_id)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "n" * 201, "\udcff"])
def test_no_job_has_such_a_name(refused: Say, name: str) -> None:
    assert "--name: name: " in refused("plan", "--name", name, str(TINY))
