"""What no flag can mean: exit code 2 and a line that names the flag, from every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.cli.main import main
from support.launch import TINY

Run = Callable[..., str]
ODD_IDS = ("", "a\ntouch PWNED\n", "a\x00b", "-rf", ".hidden", "a/b", "last", "é" * 101, "\udcff")


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command that must be refused; its stderr, which is short and printable."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        shown = capsys.readouterr()
        assert end.value.code == 2, shown
        assert shown.err.replace("\n", "").isprintable(), shown.err
        assert len(shown.err) < 3000
        assert not list(tmp_path.iterdir())
        return shown.err

    return run


@pytest.mark.parametrize("run_id", ODD_IDS)
def test_no_run_has_such_an_id(refused: Run, run_id: str) -> None:
    assert "--run-id" in refused("launch", "--run-id", run_id, str(TINY))


@pytest.mark.parametrize("command", ["status", "logs", "why", "cancel", "resume", "export"])
def test_no_run_is_found_by_it(refused: Run, command: str) -> None:
    to = ("--to", "onnx") if command == "export" else ()
    for run_id in ODD_IDS:
        refused(command, *to, "--", run_id)


NO_NUMBERS = ("²", "٣", "--1", "1" * 5000, "1e400", "x", "0x" + "f" * 5000)


@pytest.mark.parametrize("text", [*NO_NUMBERS, "100000000000000000000"])
def test_no_number(refused: Run, text: str) -> None:
    """All of them at once, each reported with its flag."""
    flags = ("--nodes", "--procs", "--gpus", "--seed", "--max-restarts")
    shown = refused("plan", *(part for flag in flags for part in (flag, text)), str(TINY))
    assert all(f"{flag}: " in shown for flag in flags)


@pytest.mark.parametrize("text", ["100000000", "1:100000000000", "1:100000"])
def test_no_cluster_has_so_many_nodes(refused: Run, text: str) -> None:
    assert "--nodes: launch.nodes" in refused("plan", "--nodes", text, str(TINY))


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_no_place_of_torchrun(refused: Run, text: str) -> None:
    two = ("plan", "--launcher", "torchrun", "--nodes", "2", str(TINY))
    assert "--node-rank" in refused(*two, "--node-rank", text, "--rdzv-endpoint", "h:29400")
    assert "--rdzv-endpoint" in refused(*two, "--node-rank", "0", "--rdzv-endpoint", f"h:{text}")


@pytest.mark.parametrize("text", NO_NUMBERS)
@pytest.mark.parametrize("flag", ["--procs", "--nodes", "--epoch-samples"])
def test_no_number_for_verify(refused: Run, flag: str, text: str) -> None:
    assert flag in refused("verify", flag, text, str(TINY))


@pytest.mark.parametrize("text", ["h:²", "h:" + "1" * 5000, "h:0"])
def test_no_address_of_a_cluster(refused: Run, text: str) -> None:
    assert "HOST:PORT" in refused("plan", "--launcher", "ray", "--address", text, str(TINY))


@pytest.mark.parametrize("text", ["0", "1e20", "-1", ".inf", "1" * 400 + "d", "²s", "0.0s"])
def test_no_duration(refused: Run, text: str) -> None:
    timeouts = (f"launch.{name}_timeout" for name in ("join", "stop", "collective"))
    fields = ("checkpoint.every", *timeouts)
    flags = [part for field in fields for part in ("--set", f"{field}={text}")]
    shown = refused("plan", *flags, str(TINY))
    assert all(f" {field}: " in shown for field in fields)


def test_no_duration_of_a_profile(refused: Run) -> None:
    wrong = ("-o", "place_timeout=0", "-o", "lost_after=1e20")
    shown = refused("plan", "--launcher", "ray", *wrong, str(TINY))
    assert "-o place_timeout: " in shown
    assert "-o lost_after: " in shown


LONG = "n" * 300


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("--launcher", LONG, str(TINY)), "--launcher"),
        (("--set", f"task={LONG}.py:T", str(TINY)), "--set task"),
        (("--set", f"task={LONG}:T", str(TINY)), "--set task"),
        (("--set", f"data.paths=[{LONG}]", str(TINY)), "--set data.paths"),
        (("--runs", LONG, str(TINY)), "--runs"),
        ((f"{LONG}.yaml",), LONG[:20]),
        ((f"{LONG}.py",), LONG[:20]),
    ],
)
def test_no_file_has_such_a_name(refused: Run, arguments: tuple[str, ...], place: str) -> None:
    assert place in refused("launch", *arguments)


@pytest.mark.parametrize(
    "arguments", [("--set", "args.a=\udcff"), ("--set", "\udcff=1"), ("--launcher", "\udcff")]
)
def test_no_text(refused: Run, arguments: tuple[str, ...]) -> None:
    assert arguments[0] in refused("plan", *arguments, str(TINY))


def test_the_current_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (["launch", str(TINY)], ["status"], ["runs"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
        assert "current directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "n" * 201, "\udcff"])
def test_no_job_has_such_a_name(refused: Run, name: str) -> None:
    assert "--name: name: " in refused("plan", "--name", name, str(TINY))
