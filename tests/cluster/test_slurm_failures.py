"""Launcher `slurm` when something of the cluster breaks: it goes on, or says why, and ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import pytest

from cluster import Cluster
from dtrain.run.backend_files import SlurmFiles
from dtrain.run.rundir import RunDir
from support.launch import (
    OFTEN,
    SLOW,
    TINY,
    dtrain,
    events,
    metrics,
    started,
    status,
    until,
    wait_for_step,
)
from support.slurm_cluster import TWO, goes_on, job_of, needs_slurm, sha

_SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def void(cluster: Cluster, *command: str) -> None:
    cluster.run(list(command))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    """Three nodes with processes and mounts of their own, which each test mends again."""
    needs_slurm()
    with Cluster(nodes=3, slurmd_timeout_s=3) as cluster:
        if cluster.spec.mode == "ports":
            pytest.skip("needs nodes with processes of their own")
        yield cluster


@pytest.fixture
def fragile(hosts: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Those nodes, with Slurm's commands on our PATH."""
    for name, value in hosts.outside().items():
        monkeypatch.setenv(name, value)
    yield hosts
    hosts.run(["scancel", "--user", "root"], check=False)
    hosts.wait_idle()


def ours(cluster: Cluster, node: str) -> dict[str, str]:
    """pid → command of what runs on a node of runs and of their jobs."""
    listed = cluster.run(["ps", "-eo", "pid=,args="], host=node).stdout.splitlines()
    found = dict(line.split(None, 1) for line in listed)
    return {
        pid: args
        for pid, args in found.items()
        if any(word in args for word in ("slurmstepd: [", "slurm_script", "-m dtrain."))
    }


# ---------------------------------------------------------------------- Slurm's daemons


def saved(cluster: Cluster, run: RunDir) -> bool:
    """Whether the controller would know after its death that the job of a run has started."""
    state = cluster.files.state / "job_state"
    return state.exists() and state.stat().st_mtime > run.handle(0).stat().st_mtime + 3


def test_while_the_controller_is_away_the_run_ends_and_following_waits(
    fragile: Cluster, tmp_path: Path
) -> None:
    """The controller comes back after the end of training."""

    def messages() -> list[str]:
        words = [event["what"] for event in events(run, "waiting")]
        return [what for what in words if what.startswith("Slurm does not answer: ")]

    slower = ("--set", "args.pause=0.2", "--set", "train.steps=100")
    with started("launch", *TWO, *slower, TINY, cwd=tmp_path) as launch:
        run = wait_for_step(tmp_path, 5)
        until("the controller to save that the job runs", lambda: saved(fragile, run), 30)
        fragile.kill_ctl()
        with started("logs", "--follow", run.id, cwd=tmp_path) as follower:
            try:
                until("a message about it", messages, 60)
                now = status(run)
                assert (now["state"], launch.poll(), follower.poll()) == ("running", None, None)
                assert "Unable to contact slurm controller" in now["slurm"]
                until("the end of training", SlurmFiles(run).end(0).exists, 90)
                assert (launch.poll(), follower.poll()) == (None, None)
            finally:
                fragile.start_ctl()
            assert follower.wait(120) == 0
        assert launch.wait(60) == 0
    assert run.attempts() == [0]
    fragile.wait_idle()  # no node is drained either


def test_a_node_whose_daemon_was_killed_is_replaced(
    fragile: Cluster, tmp_path: Path, unbroken: str
) -> None:
    """Its ranks compute on, and would write into the same run."""
    try:
        slower = ("--set", "args.pause=0.4")  # 24 s: longer than Slurm waits for the daemon
        run, _ = goes_on(tmp_path, lambda run: fragile.kill_slurmd("n1"), *slower, *OFTEN)
        assert events(run, "attempt_started")[1]["nodes"] == ["n0", "n2"]
        assert sha(run) == unbroken
        until("the old ranks to end", lambda: not ours_of(fragile, "n1", "-m dtrain."), 60)
    finally:
        fragile.start_slurmd("n1")


def ours_of(cluster: Cluster, node: str, word: str) -> list[str]:
    return [pid for pid, args in ours(cluster, node).items() if word in args]


def test_a_killed_step_daemon_costs_no_training(
    fragile: Cluster, tmp_path: Path, unbroken: str
) -> None:
    """Its agent lives on, and srun gives it up once the others have ended."""
    sooner = ("--set", "launch.stop_timeout=3s")  # and 10 s: how long srun waits for that node
    with started("launch", *TWO, *SLOW, *OFTEN, *sooner, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 5)
        (daemon,) = ours_of(fragile, "n1", f"slurmstepd: [{job_of(run)}.0]")
        fragile.run(["kill", "-KILL", daemon], host="n1")
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert sha(run) == unbroken
    assert sorted({line["step"] for line in metrics(run)}) == list(range(1, 61))
    assert not ours_of(fragile, "n1", "-m dtrain.")


def test_nodes_without_slurms_commands_are_requeued_by_who_follows(
    fragile: Cluster, tmp_path: Path, unbroken: str
) -> None:
    hidden = [path for name in ("scontrol", "squeue") if (path := shutil.which(name, path=_SYSTEM))]
    try:
        for path in hidden:
            for node in fragile.nodes:
                fragile.run(["mount", "--bind", "/dev/null", path], host=node)
        leave = ["scancel", "--signal=USR2"]
        run, _ = goes_on(tmp_path, lambda run: void(fragile, *leave, job_of(run)))
    finally:
        for path in hidden:
            for node in fragile.nodes:
                fragile.run(["umount", path], host=node)
    assert "squeue: Permission denied" in SlurmFiles(run).log.read_text()
    assert sha(run) == unbroken


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("node", ["n0", "n1"])
def test_a_run_folder_that_a_node_does_not_have_is_named(
    fragile: Cluster, tmp_path: Path, node: str
) -> None:
    """n0 starts the batch script, n1 only an agent."""
    runs = tmp_path / "runs"
    runs.mkdir()
    fragile.run(["mount", "-t", "tmpfs", "none", str(runs)], host=node)
    try:
        done = dtrain("launch", *TWO, TINY, cwd=tmp_path)
    finally:
        fragile.run(["umount", str(runs)], host=node)
    assert done.returncode == 1, done.stdout
    assert node != "n1" or "n1 cannot write to the run directory" in done.stdout
    assert "run directory" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 1 MiB, and a cluster that sees it and holds its jobs to their memory."""
    needs_slurm()
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dtrain-test", str(disk)]
    groups = Path("/sys/fs/cgroup/memory")
    if os.getuid() or not groups.is_dir() or subprocess.run(mount, check=False).returncode:
        pytest.skip("takes root, and cgroups of version 1")
    try:
        prefix = f"m{token_hex(2)}x"
        with Cluster(nodes=2, memory_limits=True, node_prefix=prefix) as cluster:
            if cluster.spec.mode == "ports":
                pytest.skip("needs nodes with processes of their own")
            for name, value in cluster.outside().items():
                monkeypatch.setenv(name, value)
            yield disk
        assert not list(groups.glob(f"slurm_{prefix}*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_and_a_rank_out_of_memory_are_named(small: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY.parent, tmp_path / "job")  # alone, so that its code fits
    job = tmp_path / "job" / "job.yaml"
    (tmp_path / "here").mkdir()
    greedy = ("--set", "args.misbehave=memory", "--nodes", "1")
    done = dtrain("launch", *TWO, *greedy, job, cwd=tmp_path / "here", timeout=180)
    assert done.returncode == 137, done.stdout
    assert "FAILED: rank 1 on node 0 (m" in done.stdout
    assert "[failure.out-of-memory]" in done.stdout

    endless = ("--set", "train.steps=100000", "--set", "args.pause=0.05", *OFTEN)
    with started("launch", *TWO, *endless, "--runs", small / "runs", job, cwd=tmp_path) as process:
        until("a step", lambda: list(small.glob("runs/*/metrics.jsonl")), 60)
        with (small / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert "No space left on device" in output

    full = dtrain("launch", *TWO, "--runs", small / "runs", job, cwd=tmp_path)
    assert full.returncode == 1
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr


# ---------------------------------------------------------------------- accounting


@pytest.fixture(scope="module")
def counted() -> Iterator[Cluster]:
    """A node, and a database that knows one account, `root`, and one QOS, `normal`."""
    needs_slurm(accounting=True)
    with Cluster(nodes=1, accounting=True, associations=True) as cluster:
        yield cluster


def test_accounts_qos_and_what_only_sacct_remembers(
    counted: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in counted.outside().items():
        monkeypatch.setenv(name, value)
    place = tmp_path / "launchers"
    place.mkdir()
    for option, reason in (("account", "Invalid account"), ("qos", "Invalid qos specification")):
        text = f"launcher: slurm\nextends: slurm\noptions:\n  {option}: nobody\n"
        (place / f"{option}.yaml").write_text(text)
        done = dtrain("launch", "--launcher", option, TINY, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert reason in done.stderr
        assert f"launchers/{option}.yaml:4:{len(option) + 5}: {option}: nobody" in done.stderr

    one = ("--launcher", "slurm", "--account", "root", "--detach", "--run-id", "killed")
    assert (
        dtrain("launch", *one, *SLOW, "--set", "args.pause=1", TINY, cwd=tmp_path).returncode == 0
    )
    run = RunDir(tmp_path / "runs" / "killed")
    until("a step", lambda: metrics(run), 60)
    script = ours_of(counted, "n0", "slurm_script")
    counted.run(["kill", "-KILL", *script, *ours_of(counted, "n0", "-m dtrain.")], host="n0")
    counted.wait_job(job_of(run), ["FAILED"])
    recorded = ["sacct", "-nXo", "state", "-j", job_of(run)]
    until("its record", lambda: "FAILED" in counted.run(recorded).stdout, 30)
    counted.kill_ctl()
    for state in counted.files.state.glob("job_state*"):
        state.unlink()
    counted.start_ctl()
    assert job_of(run) not in counted.run(["squeue", "--states=all", "--noheader"]).stdout.split()
    assert status(run)["state"] == "failed"
    assert f"job {job_of(run)} ended with code 137" in dtrain("why", run.id, cwd=tmp_path).stdout
