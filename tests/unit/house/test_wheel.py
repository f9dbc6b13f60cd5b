"""What is installed is what was written: sdist → wheel → a fresh environment, and the profiles."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from dtrain import catalog
from support import JOBS, ROOT

LOAD = """\
import sys
from dtrain.assets import asset_dir
from dtrain.job.profile import load_profile
print(asset_dir("launchers"))
assert (asset_dir("slurm") / "job.sbatch.j2").is_file()
assert (asset_dir("examples") / "start" / "task.py").is_file()
for name in sys.argv[1:]:
    assert load_profile(name, ".").spec.launcher == name
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with an sdist and the wheel built from it, without the network."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_has_every_shipped_file_and_nothing_of_the_checkout(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.startswith("dtrain/_assets/")}
    assert packed >= {f"dtrain/_assets/launchers/{name}.yaml" for name in catalog.LAUNCHERS}
    assert "dtrain/errors.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dtrain"}


def test_the_sdist_can_be_tested_and_read(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "tests/unit/house/test_wheel.py"} <= names


def test_the_package_index_would_take_both(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_image_passes_its_linter() -> None:
    """The image is not built: that needs a container engine."""
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [hadolint, "--failure-threshold", "style", ROOT / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def interpreter(minor: int) -> str | None:
    """A Python that works: on the PATH, or one of pyenv's."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python3.{minor}"), *versions.glob(f"3.{minor}.*/bin/python3.{minor}")]
    for python in filter(None, found):
        if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:
            return str(python)
    return None


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_a_bare_environment_gets_all_that_a_launch_needs(
    built: Path, tmp_path: Path, minor: int
) -> None:
    """As a user installs it, with all dependencies: a second environment of 5 GB."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"for want of Python 3.{minor}")
    (wheel,) = built.glob("*.whl")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    venv = tmp_path / "venv"
    try:
        subprocess.run([python, "-m", "venv", venv], check=True, env=env)
        pip = [venv / "bin" / "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True, env=env)
        shutil.copytree(JOBS / "tiny", tmp_path / "job")
        done = subprocess.run(
            [venv / "bin" / "dtrain", "launch", "--procs", "2", "job.yaml"],
            cwd=tmp_path / "job", env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(venv, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout


def test_every_profile_loads_from_an_installed_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--no-index", "--no-deps", wheel]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["XDG_CONFIG_HOME"] = str(tmp_path / "nothing")
    subprocess.run(install, check=True, env=env)
    # dependencies come from the environment that runs the tests, dtrain from the wheel
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text("\n".join(sorted(outer)))
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [python, "-c", LOAD, *catalog.LAUNCHERS],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "dtrain" / "_assets" / "launchers"
