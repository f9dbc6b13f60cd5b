"""What is installed is what was written: sdist → wheel → a fresh environment, and the profiles."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from dtrain import catalog
from support import ROOT
from support.package import built_in

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
    return built_in(tmp_path_factory.mktemp("built"))


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
