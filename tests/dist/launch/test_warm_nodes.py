"""Nodes that are forked from a warm server: launches as all others, one after the other."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.job.launcher_options import AnyOptions
from dtrain.job.load import LoadedJob, load_job
from dtrain.job.profile import load_profile
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.launchers import base, prepare, status
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.supervise import discard, drive
from dtrain.launchers.warm import WarmServer
from dtrain.run import failures, files, ids
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from support.errors import raises
from support.launch import TINY, alive, events, wait_for


class Silent:
    """A console for nobody."""

    begin = say = staticmethod(discard)

    def tick(self) -> None:
        """Nothing to show."""

    close = tick

    def width(self) -> int | None:
        return None

    def paint(self, text: str, _colour: str | None) -> str:
        return text


@pytest.fixture(scope="module")
def server() -> Iterator[WarmServer]:
    made = WarmServer(["dtrain.train.loop.native", "dtrain.train.strategies.ddp"])
    try:
        assert made.is_ready()
        yield made
    finally:
        made.close()


def planned(folder: Path, *settings: str) -> tuple[LaunchPlan, LoadedJob]:
    """Two ranks on two nodes."""
    profile = load_profile("local", TINY.parent)
    chosen = ("launch.nodes=2", "launch.procs_per_node=1", "train.steps=2", *settings)
    job = load_job(TINY, chosen, profile.launch)
    facts = Facts.gather(ids.new("warm"), folder)
    plan = make_plan(
        job.spec, job_dir=str(TINY.parent), launcher="local", profile="local", options=AnyOptions(),
        facts=facts,
    )  # fmt: skip
    return base.load("local").complete(plan, facts), job


def launch(server: WarmServer, folder: Path, *settings: str) -> tuple[int, RunDir]:
    """To its end; the exit code, and the run."""
    plan, job = planned(folder, *settings)
    code = drive(LocalLauncher(server.spawn), plan, job.spec, job.text, Silent())
    return code, plan.run


def environments(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def test_each_launch_has_its_own_environment_and_nothing_of_the_one_before(
    server: WarmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for name in ("A_FIRST", "A_SECOND"):
        monkeypatch.setenv(name, "here")
        told = tmp_path / name
        told.mkdir()
        code, run = launch(server, tmp_path, f"args.env_to={told}", f"launch.env={{{name}_W: w}}")
        assert code == 0
        assert status.state_of(run)[0] == "succeeded"
        found = environments(told)
        assert sorted(each["RANK"] for each in found) == ["0", "1"]
        assert all(each[f"{name}_W"] == "w" and each[name] == "here" for each in found)
        seen += found
        monkeypatch.delenv(name)
    assert not any("A_FIRST" in name for each in seen[2:] for name in each)
    pids = {event["pid"] for event in files.read_lines(run.events) if "pid" in event}
    assert not any(map(psutil.pid_exists, pids))


def test_a_rank_that_fails_is_named_and_the_server_goes_on(
    server: WarmServer, tmp_path: Path
) -> None:
    code, run = launch(server, tmp_path, "args.misbehave=kill", "args.rank=1", "args.at=1")
    assert code == 128 + signal.SIGKILL
    assert [record.rank for record in failures.read_all(run, 0) if record.kind == "signal"] == [1]
    assert launch(server, tmp_path)[0] == 0


def test_a_server_that_cannot_import_or_has_threads_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threads.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    servers = [WarmServer([module]) for module in ("no_such_module", "threads")]
    try:
        assert not any(server.is_ready() for server in servers)
        assert not any(server.is_ready() for server in servers), "when it is asked again"
        with raises("launch.fork-server-ended"):
            launch(servers[0], tmp_path)
    finally:
        for server in servers:
            server.close()


def test_a_server_that_is_killed_takes_its_nodes_along(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    server = WarmServer([])
    (process,) = set(psutil.Process().children()) - before
    try:
        assert server.is_ready()
        plan, job = planned(tmp_path, "args.pause=60")
        prepare.prepare(plan, job.spec, job.text, Handle.of_this_process("local", 0))
        launched = LocalLauncher(server.spawn).start(plan)
        assert wait_for(lambda: len(events(plan.run, "workers_started")) == 2, 60)
        below = process.children(recursive=True)
        assert len(below) >= 5  # the node, two agents, two ranks
        process.kill()
        assert wait_for(lambda: launched.poll() is not None, 10)
        assert launched.poll() == 128 + signal.SIGKILL
        assert wait_for(lambda: not any(map(alive, below)), 10)
        launched.kill()  # of what has ended
        assert not server.is_ready()
    finally:
        server.close()
