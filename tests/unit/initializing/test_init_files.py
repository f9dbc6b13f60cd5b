"""The files of `dtrain init`, and the place that it finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from dtrain.cli.main import main
from dtrain.job.load import load_job
from dtrain.job.profile import load_profile
from dtrain.job.schema import job_schema
from dtrain.launchers.slurm.partitions import accounts, partitions
from support.errors import assert_shown, raises

SINFO = """\
cpu*|up|infinite|3|8|(null)
gpu|up|1-00:00:00|2|32|gpu:a100:4(S:0-1),shard:8
gpu|up|1-00:00:00|1|64|gpu:h100:2,gpu:a100:6
old|down|1:00|1|2|(null)
"""
FILES = ["job.yaml", "launchers/local.yaml", "task.py"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory on a machine without Slurm, Ray and profiles of the user."""
    work = tmp_path / "my job"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return work


def fake(name: str, output: str, code: int = 0) -> None:
    """A program that stands for one of Slurm's; `dtrain init` runs it by its name."""
    program = Path(os.environ["PATH"]) / name
    program.write_text(f"#!/bin/sh\n# fake\n/bin/cat <<'END'\n{output}END\nexit {code}\n")
    program.chmod(0o755)


def init(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main(["init", *arguments])
    printed = capsys.readouterr()
    assert end.value.code == code, printed
    return printed.err if code else printed.out


def written(folder: Path = Path()) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_first_job_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    text = init(capsys, "--procs", "2")
    assert text.splitlines()[-1].split("#")[0].strip() == "dtrain launch job.yaml"
    assert written() == FILES
    job = load_job("job.yaml").spec
    assert (job.name, job.task) == ("my-job", "task.py:Spirals")
    launch = load_profile("local", ".").spec.launch
    assert (launch.nodes, launch.procs_per_node, launch.gpus_per_node) == ((1, 1), 2, 0)
    jsonschema.validate(yaml.safe_load(Path("job.yaml").read_text()), job_schema())
    for name in FILES:
        lines = Path(name).read_text().split("\n")
        assert lines[-1] == ""
        assert all(line == line.rstrip() for line in lines), name
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,B,UP,SIM,RET,RUF,W",
         "--line-length", "100", "task.py"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_directory_of_its_own_and_the_commands_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = init(capsys, "deep/er", "--procs", "1")
    assert "dtrain launch deep/er/job.yaml" in text
    assert written(Path("deep/er")) == FILES


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("task.py").write_text("mine")
    Path("launchers").mkdir()
    Path("launchers/local.yaml").write_text("mine")
    shown = init(capsys, code=2)
    assert_shown(shown, "init.files-exist", "task.py", "--force")
    assert written() == ["launchers/local.yaml", "task.py"]
    Path("task.py").unlink()
    assert_shown(init(capsys, code=2), "init.files-exist", "launchers/local.yaml")
    assert written() == ["launchers/local.yaml"]
    init(capsys, "--force")
    assert written() == FILES
    assert "mine" not in Path("launchers/local.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--nodes", "0"), "usage.invalid-value"),
        (("--nodes", "3:1"), "usage.invalid-value"),
        (("--procs", "0"), "usage.invalid-value"),
        (("--launcher", "k8s"), "usage.invalid-value"),
        (("--launcher", "ray", "-p", "gpu"), "usage.flag-of-other-launcher"),
        (("--from", "gone.sh"), "init.no-file"),
    ],
)
def test_a_wrong_flag_writes_nothing(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: str
) -> None:
    assert_shown(init(capsys, *arguments, code=2), code)
    assert written() == []


def test_what_cannot_be_launched_here_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    shown = init(capsys, "--gpus", "64", code=2)
    assert_shown(shown, "plan.too-few-gpus", "launchers/local.yaml")


# -- Slurm and Ray ---------------------------------------------------------------------------------


def test_partitions_and_accounts_are_found() -> None:
    fake("sinfo", SINFO)
    fake("sacctmgr", "physics|chem\nphysics|physics\n")
    cpu, gpu = partitions()
    assert (cpu.name, cpu.is_default, cpu.nodes, cpu.cores, cpu.gpus) == ("cpu", True, 3, 8, 0)
    assert (gpu.nodes, gpu.cores, gpu.gpus, gpu.alike) == (3, 32, 4, False)
    assert gpu.limit == "1-00:00:00"
    assert accounts() == ["physics", "chem"]
    fake("sacctmgr", "no accounting\n", code=1)
    assert accounts() == []
    fake("sinfo", "", code=1)
    with raises("slurm.controller-silent", "sinfo"):
        partitions()


def slurm_profile() -> dict[str, object]:
    """Its options and sizes, by name."""
    profile = yaml.safe_load(Path("launchers/slurm.yaml").read_text())
    return {**profile.get("options", {}), **profile["launch"]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"partition": "cpu", "account": "physics", "gpus_per_node": 0, "procs_per_node": 2}),
        (("--gpus", "2"), {"partition": "gpu", "gpus_per_node": 2}),
        (("-p", "gpu"), {"partition": "gpu", "gpus_per_node": 4}),
        (("-A", "chem", "-t", "30", "-N", "1:2"),
         {"account": "chem", "time": "30m", "nodes": "1:2"}),
    ],
)  # fmt: skip
def test_a_profile_fits_the_cluster(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: dict[str, object]
) -> None:
    fake("sinfo", SINFO)
    fake("sacctmgr", "physics|chem\nphysics|physics\n")
    text = init(capsys, *arguments)
    assert "dtrain launch --launcher slurm job.yaml" in text
    profile = slurm_profile()
    assert {name: profile.get(name) for name in expected} == expected
    load_profile("slurm", ".")


def test_the_users_own_profile_stays_in_force(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site = tmp_path / "config" / "dtrain" / "launchers"
    site.mkdir(parents=True)
    text = "launcher: slurm\nextends: slurm\noptions: {partition: gpu, mem: 8G}\n"
    (site / "slurm.yaml").write_text(text)
    fake("sinfo", SINFO)
    init(capsys)
    assert "partition" not in slurm_profile()
    options = load_profile("slurm", ".").spec.options
    assert (options["partition"], options["mem"]) == ("gpu", "8G")
    assert slurm_profile()["gpus_per_node"] == 4


def test_a_silent_cluster_is_told_and_not_chosen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("sinfo", "", code=1)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    text = init(capsys)
    assert "sinfo does not answer" in text
    assert "Ray at ray://127.0.0.1:1: " in text
    assert written() == FILES


def test_the_address_of_a_dashboard_submits_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no dashboard answers" in init(capsys, "--address", "http://127.0.0.1:1")
    options = yaml.safe_load(Path("launchers/ray.yaml").read_text())["options"]
    assert options == {"address": "http://127.0.0.1:1", "submit": "job"}


def test_a_stale_address_of_ray_is_passed_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    assert "Ray" not in init(capsys)


def test_a_batch_script_chooses_slurm_where_there_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("train.py").write_text("print(1)\n")
    Path("a.sbatch").write_text("#SBATCH -N 2 -t 1-0\nsrun torchrun --tee 1 train.py\n")
    text = init(capsys, "--from", "a.sbatch", "--launcher", "local", "out")
    assert "not carried over: --from: time: " in text
    text = init(capsys, "--from", "a.sbatch")
    assert "not carried over: a.sbatch:2: --tee 1: " in text
    assert slurm_profile()["nodes"] == 2
    assert not Path("task.py").exists()
