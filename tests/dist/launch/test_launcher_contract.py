"""The contract of all launchers, on this machine; those that need a cluster are in tests/cluster.

A new launcher adds a class here or there, with a fixture `way`.
"""

from __future__ import annotations

import shutil
import signal
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dtrain import catalog, ports
from support import EXAMPLES
from support.contract import RUN_ID, LauncherContract, Started, Way, finish
from support.launch import TINY, dtrain, metrics, started, wait_for_step

ON_A_CLUSTER = {"slurm", "ray"}  # tests/cluster/test_*_launch.py


def test_every_launcher_is_held_to_the_contract() -> None:
    assert {"local", "torchrun"} | ON_A_CLUSTER == set(catalog.LAUNCHERS)


@contextmanager
def local(cwd: Path, *arguments: str, **env: str) -> Iterator[Started]:
    """One command starts both nodes."""
    with started("launch", "--nodes", "2", "--procs", "2", *arguments, TINY, cwd=cwd,
                 env=env) as process:  # fmt: skip
        yield [process]


@contextmanager
def torchrun(cwd: Path, *arguments: str, **env: str) -> Iterator[Started]:
    """One command a node, as on two hosts that share a file system."""
    port = ports.free_candidate("127.0.0.1", str(cwd))
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    "launch", "--launcher", "torchrun", "--nodes", "2", "--procs", "2",
                    "--node-rank", str(node_rank), "--run-id", RUN_ID,
                    "--rdzv-endpoint", f"127.0.0.1:{port}", *arguments, TINY, cwd=cwd, env=env,
                )
            )
            for node_rank in range(2)
        ]  # fmt: skip


class TestLocal(LauncherContract):
    @pytest.fixture
    def way(self) -> Way:
        return Way(local, ("node-0", "node-1"))


class TestTorchrun(LauncherContract):
    @pytest.fixture
    def way(self) -> Way:
        return Way(torchrun, ("", ""))


HERE_ALONE = """launcher: rsh
options:
  shell: [env, "RSH_HOST={host}"]
"""


@pytest.mark.cold  # what is installed is found by a new interpreter
class TestOutside(LauncherContract):
    """The launcher of examples/launcher, which docs/extending.md shows."""

    @pytest.fixture
    def way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
        installed = install(EXAMPLES / "launcher", tmp_path / "site")
        monkeypatch.setenv("PYTHONPATH", str(installed))
        (tmp_path / "launchers").mkdir()
        (tmp_path / "launchers" / "rsh.yaml").write_text(HERE_ALONE)
        hosts = ("127.0.0.1", "localhost")

        @contextmanager
        def launch(cwd: Path, *arguments: str, **env: str) -> Iterator[Started]:
            asked = ("--launcher", "rsh", "--hosts", ",".join(hosts), "--nodes", "2")
            with started(
                "launch", *asked, "--procs", "2", *arguments, TINY, cwd=cwd, env=env
            ) as process:
                yield [process]

        return Way(launch, hosts)

    def test_its_flags_are_shown_and_checked(self, tmp_path: Path, way: Way) -> None:
        asked = ("launch", "--launcher", "rsh", "--dry-run")
        assert "--hosts HOST,HOST" in dtrain(*asked, "--help", cwd=tmp_path).stdout
        assert "--hosts" not in dtrain("launch", "--help", cwd=tmp_path).stdout
        refused = dtrain(*asked, "--hosts", "a", "--nodes", "2", TINY, cwd=tmp_path)
        assert refused.returncode == 2
        assert "--hosts names 1 hosts for 2 nodes" in refused.stderr
        (tmp_path / "launchers" / "rsh.yaml").write_text(f"{HERE_ALONE}  host: a\n")
        refused = dtrain(*asked, "--hosts", "a", TINY, cwd=tmp_path)
        assert refused.returncode == 2
        assert "launchers/rsh.yaml:4:3" in refused.stderr


def install(project: Path, folder: Path) -> Path:
    """A project's module and entry points where Python finds them, as pip puts them there."""
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = folder / f"{described['name'].replace('-', '_')}-{described['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {described['name']}\nVersion: {described['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in described["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    for module in project.glob("*.py"):
        shutil.copy(module, folder)
    return folder


def test_a_killed_command_is_lost_and_can_be_resumed_at_another_size(tmp_path: Path) -> None:
    arguments = (
        "--set", "train.steps=400", "--set", "args.pause=0.05", "--set", "checkpoint.every_steps=2",
    )  # fmt: skip
    with local(tmp_path, "--env", "MY_TOKEN=s3cret", *arguments) as processes:
        run = wait_for_step(tmp_path, 5)
        processes[0].send_signal(signal.SIGKILL)
        finish(processes, 10)
    assert run.secret_env(0).exists()
    assert "lost" in dtrain("status", cwd=tmp_path).stdout
    assert not run.secret_env(0).exists()
    assert "ended from outside" in dtrain("why", cwd=tmp_path).stdout
    end = metrics(run)[-1]["step"] + 4
    done = dtrain(
        "resume", "--nodes", "1", "--procs", "1", "--set", f"train.steps={end}",
        "--set", "args.pause=0", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(run)][-1] == end
