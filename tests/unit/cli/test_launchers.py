"""`dtrain launchers`, and the options of launchers that `-o` sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.cli.main import main
from support.errors import assert_shown
from support.launch import TINY

SITE = "launcher: slurm\nextends: slurm\noptions:\n  partition: gpu\n  slurm: {nice: 3}\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a profile of its own, and one that is wrong."""
    folder = tmp_path / "launchers"
    folder.mkdir()
    (folder / "site.yaml").write_text(SITE)
    (folder / "bad.yaml").write_text("launcher: slum\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    printed = capsys.readouterr()
    assert end.value.code == code, printed
    return printed.err if code else printed.out


@pytest.mark.usefixtures("site")
def test_every_profile_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = {each["name"]: each for each in json.loads(output(capsys, "launchers", "--json"))}
    assert list(found) == ["bad", "local", "ray", "site", "slurm", "torchrun"]
    assert found["site"]["launcher"] == "slurm"
    assert found["site"]["file"] == "launchers/site.yaml"
    assert found["slurm"]["file"] == "packaged"
    assert found["bad"]["problem"].startswith("launchers/bad.yaml:1:11: ")
    text = output(capsys, "launchers")
    assert all(name in text for name in found)


@pytest.mark.usefixtures("site")
def test_every_option_has_a_value_a_source_and_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("site", "slurm", "ray", "torchrun", "local"):
        settings = json.loads(output(capsys, "launchers", name, "--json"))["settings"]
        assert all(each["help"] and each["kind"] and each["value"] for each in settings)
    found = json.loads(output(capsys, "launchers", "site", "--json"))["settings"]
    by_name = {each["name"]: each for each in found}
    assert by_name["partition"]["value"] == "gpu"
    assert by_name["partition"]["source"] == "launchers/site.yaml:4:14"
    assert by_name["partition"]["flags"] == ["-p", "--partition"]
    assert by_name["signal_before"]["value"] == "2m"
    assert by_name["signal_before"]["source"] == "default"
    text = output(capsys, "launchers", "site")
    assert all(name in text for name in by_name)


@pytest.mark.usefixtures("site")
def test_a_profile_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "launchers", "sit", code=2)
    assert_shown(shown, "profile.not-found", "--launcher sit: ", "'site'")


@pytest.mark.usefixtures("site")
def test_where_an_option_was_set(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("-p", "cpu", "-t", "10", "-o", "slurm.exclusive", "-o", "requeue=5")
    plan = ("plan", "--launcher", "site", *flags, "--json", "--explain", str(TINY))
    found = json.loads(output(capsys, *plan))
    options, sources = found["plan"]["options"], found["option_sources"]
    assert options["time"] == "0-00:10:00"
    assert options["slurm"] == {"nice": "3", "exclusive": True}
    assert {name: source for name, source in sources.items() if source != "default"} == {
        "partition": "--partition",
        "time": "--time",
        "requeue": "-o requeue",
        "slurm.nice": "launchers/site.yaml:5:17",
        "slurm.exclusive": "-o slurm.exclusive",
    } | {name: source for name, source in sources.items() if "slurm.yaml" in source}


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        (("-o", "memm=1"), "option.unknown-field", ["-o memm: ", "'mem'"]),
        (("-o", "nice=1"), "option.unknown-field", ["-o nice: ", "-o slurm.nice=100"]),
        (("-o", "requeue=x"), "option.wrong-type", ["-o requeue: ", "'x'"]),
        (("-o", "mem=1G", "--mem", "2G"), "option.given-twice", ["-o mem: ", " --mem "]),
        (("-o", "slurm.mem=1G"), "slurm.flag-not-allowed", ["-o slurm.mem: ", "'mem'"]),
        (("--address", "head:6379"), "usage.flag-of-other-launcher",
         ["--address", "--launcher ray", "'slurm'"]),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_meant(
    flags: tuple[str, ...], code: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(capsys, "plan", "--launcher", "slurm", *flags, str(TINY), code=2)
    assert_shown(shown, code, *names)


def test_a_launcher_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "plan", "-o", "mem=1G", str(TINY), code=2)
    assert_shown(shown, "option.unknown-field", "-o mem: ", "'local'")
