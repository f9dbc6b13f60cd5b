from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dtrain import catalog
from dtrain.assets import asset_dir
from dtrain.errors import JobError, Problem
from dtrain.job.load import load_job
from dtrain.job.profile import LoadedProfile, load_profile, profile_names, search_path
from support.errors import assert_problems

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a profile into `here/launchers`, `job/launchers` or `home/dtrain/launchers`."""
    for folder in ("here", "job", "home"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))

    def write(name: str, text: str) -> Path:
        folder, _, file = name.partition("/")
        above = "dtrain/launchers" if folder == "home" else "launchers"
        path = tmp_path / folder / above / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def load(write: Write, tmp_path: Path) -> Callable[[str], LoadedProfile]:
    return lambda name: load_profile(name, tmp_path / "job")


def problems_of(load: Callable[[str], LoadedProfile], name: str) -> Sequence[Problem]:
    with pytest.raises(JobError) as caught:
        load(name)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_a_packaged_profile_exists_for_each_built_in_launcher_and_no_other() -> None:
    assert profile_names([asset_dir("launchers")]) == sorted(catalog.LAUNCHERS)


@pytest.mark.parametrize("name", sorted(catalog.LAUNCHERS))
def test_packaged_profiles(load: Callable[[str], LoadedProfile], name: str) -> None:
    profile = load(name)
    assert (profile.spec.launcher, profile.name) == (name, name)
    assert profile.spec.description
    (path,) = profile.chain
    settings = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert settings
    assert all("#" in line for line in settings), "each setting has a comment"


def test_search_order(load: Callable[[str], LoadedProfile], write: Write) -> None:
    places = ["home/local.yaml", "job/local.yaml", "here/local.yaml"]
    for count, place in enumerate(places):
        path = write(place, f"launcher: local\ndescription: {place}\n")
        assert load("local").chain == [path]
        assert load("local").spec.description == places[count]


def test_a_site_file_extends_the_next_of_its_name(
    load: Callable[[str], LoadedProfile], write: Write
) -> None:
    home = write("home/local.yaml", "extends: local\nlaunch:\n  max_restarts: 1\n  nodes: 3\n")
    here = write(
        "here/local.yaml",
        "extends: local\nlaunch:\n  nodes: 2:4\n  env: {A: 010}\noptions: {a: {b: 1}}\n",
    )
    profile = load("local")
    assert profile.chain == [here, home, asset_dir("launchers") / "local.yaml"]
    assert profile.spec.launcher == "local"
    assert profile.spec.launch.nodes == (2, 4)
    assert profile.spec.launch.max_restarts == 1
    assert profile.spec.launch.env == {"A": "010"}
    assert profile.sources["launch.nodes"] == "profile local (launchers/local.yaml:3)"
    assert profile.sources["launch.max_restarts"] == f"profile local ({home}:3)"
    assert profile.sources["options.a.b"] == "profile local (launchers/local.yaml:5)"
    assert profile.sources["launch.preload"] == "default"


def test_a_profile_extends_another(load: Callable[[str], LoadedProfile], write: Write) -> None:
    write("home/big.yaml", "extends: local\nlaunch: {nodes: 8}\n")
    write("here/local.yaml", "extends: local\nlaunch: {max_restarts: 2}\n")
    launch = load("big").spec.launch
    assert (launch.nodes, launch.max_restarts) == ((8, 8), 2)


def test_a_job_takes_its_defaults_from_the_profile(
    load: Callable[[str], LoadedProfile], write: Write, tmp_path: Path
) -> None:
    write(
        "here/site.yaml", "extends: local\nlaunch: {nodes: 2, max_restarts: 7, env: {A: 1, B: 2}}\n"
    )
    (tmp_path / "job" / "t.py").write_text("class T: pass\n")
    (tmp_path / "job" / "job.yaml").write_text(
        "name: a\ntask: t.py:T\ntrain: {steps: 1, global_batch_size: 4}\n"
        "launch: {nodes: 3, env: {A: 9}}\n"
    )
    job = load_job(tmp_path / "job" / "job.yaml", profile_launch=load("site").launch)
    assert (job.spec.launch.nodes, job.spec.launch.max_restarts) == ((3, 3), 7)
    assert job.spec.launch.env == {"A": "9", "B": "2"}
    assert job.sources["launch.max_restarts"] == "profile site (launchers/site.yaml:2)"
    assert job.sources["launch.nodes"].endswith("job.yaml:4")


def test_an_unknown_profile(load: Callable[[str], LoadedProfile], tmp_path: Path) -> None:
    searched = (
        f"launchers, {tmp_path}/job/launchers, {tmp_path}/home/dtrain/launchers, "
        f"{asset_dir('launchers')}"
    )
    assert_problems(
        problems_of(load, "locl"),
        ("profile.not-found", "--launcher locl", "'locl'", searched, "'local'"),
    )
    for name in ("../launchers/local", "", ".", "a/b", "local.yaml"):
        expected = ("profile.not-found", f"--launcher {name}", repr(name))
        assert_problems(problems_of(load, name), expected)


def test_an_unknown_base(load: Callable[[str], LoadedProfile], write: Write) -> None:
    write("here/site.yaml", "launcher: local\nextends: locla\n")
    assert_problems(
        problems_of(load, "site"),
        ("profile.not-found", "launchers/site.yaml:2:10: extends", "'locla'", "'local'"),
    )
    write("here/alone.yaml", "extends: alone\n")
    assert_problems(
        problems_of(load, "alone"),
        ("profile.not-found", "launchers/alone.yaml:1:10: extends", "'alone'"),
    )


def test_a_circle_is_shown(load: Callable[[str], LoadedProfile], write: Write) -> None:
    write("here/start.yaml", "extends: a\n")
    write("here/a.yaml", "extends: b\n")
    b = write("home/b.yaml", "launcher: local\nextends: a\n")
    circle = f"launchers/a.yaml → {b} → launchers/a.yaml"
    assert_problems(problems_of(load, "start"), ("profile.circle", f"{b}:2:10: extends", circle))


def test_problems_have_places_as_in_jobs(
    load: Callable[[str], LoadedProfile], write: Write
) -> None:
    write("here/site.yaml", "extends: base\nlaunch:\n  nodez: 3\n  nodes: 4:2\nnodes: 2\n")
    write("here/base.yaml", "launcher: locla\nlaunch:\n  max_restarts: yes\n  nodes: x\n")
    site, base = "launchers/site.yaml", "launchers/base.yaml"
    known = ", ".join(catalog.LAUNCHERS)
    assert_problems(
        problems_of(load, "site"),
        ("profile.unknown-field", f"{site}:3:3: launch.nodez", "'nodes'"),
        ("profile.invalid-value", f"{site}:4:10: launch.nodes", "4:2", "min:max"),
        ("profile.unknown-field", f"{site}:5:1: nodes", "under launch"),
        ("profile.unknown-launcher", f"{base}:1:11: launcher", known, "'local'"),
        ("profile.wrong-type", f"{base}:3:17: launch.max_restarts", "whole number", "yes", "true"),
    )
    write("here/bare.yaml", "description: nothing else\n")
    assert_problems(
        problems_of(load, "bare"), ("profile.missing-field", "launchers/bare.yaml:1:1: launcher")
    )
    write("here/odd.yaml", "extends: [a, b]\n")
    assert_problems(
        problems_of(load, "odd"),
        ("profile.wrong-type", "launchers/odd.yaml:1:10: extends", "a list"),
    )
    write("here/empty.yaml", "")
    assert_problems(problems_of(load, "empty"), ("yaml.empty", "launchers/empty.yaml", "launcher"))


def test_xdg_config_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert tmp_path / ".config" / "dtrain" / "launchers" in search_path(tmp_path)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert tmp_path / ".config" / "dtrain" / "launchers" in search_path(tmp_path)


def test_one_directory_is_searched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    assert len(search_path(tmp_path)) == len(search_path(Path("."))) == 3


@pytest.mark.parametrize("name", ["with space", "quo'te\"", "semi;colon", "new\nline"])
def test_hostile_names(
    load: Callable[[str], LoadedProfile], write: Write, name: str, tmp_path: Path
) -> None:
    write(f"here/{name}.yaml", "extends: local\n")
    assert load(name).spec.launcher == "local"
    assert "\n" not in "".join(load(name).sources.values())
