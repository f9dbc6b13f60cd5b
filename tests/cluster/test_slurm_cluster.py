"""The cluster of the other tests is a real one, fails on request, and leaves nothing."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, ClusterError, CommandError, missing, needs, processes
from cluster.spec import Files, State
from support import ROOT
from support.launch import until
from support.slurm_cluster import needs_slurm, submit

TOOL = ROOT / "slurm" / "cluster"
SLEEP = ["--wrap", "exec sleep 600"]

pytestmark = pytest.mark.usefixtures("leak_guard")


@pytest.fixture(scope="module")
def breakable() -> Iterator[Cluster]:
    """Quick to give a node up; broken and mended by each test that takes it."""
    needs_slurm()
    with Cluster(nodes=3, slurmd_timeout_s=3) as cluster:
        yield cluster


def processes_of(directory: Path) -> set[int]:
    """What its state tells of, and all that name the directory in command or environment."""
    recorded = set()
    if (directory / "state.json").exists():
        state = State.load(Files.at(directory))
        recorded = {state.keeper, *state.daemons.values()}
        recorded |= {pid for host in state.hosts.values() for pid in (host.init, host.holder)}
    return {pid for pid in processes.all_pids() if pid in recorded or names(pid, directory)}


def names(pid: int, directory: Path) -> bool:
    try:
        texts = [Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ")]
    except OSError:
        return False
    return str(directory).encode() in b"".join(texts) and pid != os.getpid()


def tool(*words: str | Path, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


# ---------------------------------------------------------------------- what it can do


def test_four_separate_hosts(slurm_cluster: Cluster) -> None:
    assert slurm_cluster.node_states() == dict.fromkeys(slurm_cluster.nodes, "idle")
    shown = slurm_cluster.run(["srun", "-N4", "sh", "-c", "echo $(hostname) $(hostname -I)"]).stdout
    if slurm_cluster.spec.mode == "ports":
        assert len(shown.splitlines()) == 4
    else:
        assert sorted(shown.splitlines()) == [f"n{node} 10.77.1.{node + 1}" for node in range(4)]


def test_gpus_are_counted_and_shared_out(slurm_cluster: Cluster) -> None:
    ask = ["srun", "-N2", "--ntasks-per-node=1"]
    show = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert slurm_cluster.run([*ask, "--gpus-per-node=2", *show]).stdout.split() == ["0,1"] * 2
    with pytest.raises(CommandError, match="configuration is not available"):
        slurm_cluster.run([*ask, "--gpus-per-node=5", *show])


def test_partitions(slurm_cluster: Cluster) -> None:
    output = slurm_cluster.run(["sinfo", "-h", "-o", "%P %l"]).stdout.split("\n")
    assert sorted(filter(None, output)) == [
        "high infinite", "low infinite", "main* infinite", "short 2:00",
    ]  # fmt: skip


def test_commands_from_outside(
    slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a launcher under test calls them, which knows nothing of hosts."""
    for name, value in slurm_cluster.outside().items():
        monkeypatch.setenv(name, value)
    job = ["sbatch", "--wait", "-N2", "-o", "out.txt", "--wrap", "srun hostname; command -v srun"]
    subprocess.run(job, check=True, capture_output=True, timeout=60, cwd=tmp_path)
    *_, srun = (tmp_path / "out.txt").read_text().split()
    assert srun == shutil.which("srun", path=os.environ["PATH"].partition(":")[2])


def test_a_preempted_job_goes_back_to_the_queue(slurm_cluster: Cluster) -> None:
    low = submit(slurm_cluster, "-p", "low", "-N4", "--exclusive", *SLEEP)
    slurm_cluster.wait_job(low, ["RUNNING"])
    high = submit(slurm_cluster, "-p", "high", "-N4", "--exclusive", "--wrap", "srun sleep 1")
    slurm_cluster.wait_job(high, ["COMPLETED"])
    assert slurm_cluster.job(low)["JobState"] == "PENDING"
    assert slurm_cluster.job(low)["Restarts"] == "1"
    slurm_cluster.run(["scancel", low])
    slurm_cluster.wait_idle()


# ---------------------------------------------------------------------- faults


def separate(cluster: Cluster) -> None:
    if cluster.spec.mode == "ports":
        pytest.skip("this machine can have no separate hosts")


def test_lost_nodes(breakable: Cluster) -> None:
    """One by its plug, one by its cable, at the same time: noticing takes most of this test."""
    separate(breakable)
    off = submit(breakable, "-w", "n1", "--no-requeue", *SLEEP)
    cut = submit(breakable, "-w", "n2", "--requeue", *SLEEP)
    for job in (off, cut):
        breakable.wait_job(job, ["RUNNING"])
    breakable.power_off("n1")
    breakable.cut("n2")
    with pytest.raises(subprocess.TimeoutExpired):
        breakable.run(["bash", "-c", "echo > /dev/tcp/n1/6818"], timeout=0.5)

    breakable.wait_job(off, ["NODE_FAIL"])
    breakable.wait_job(cut, ["PENDING"])
    for node in ("n1", "n2"):
        breakable.wait_node(node, ["down"])

    breakable.power_on("n1")
    breakable.heal("n2")
    breakable.wait_node("n1", ["idle"])
    breakable.wait_job(cut, ["RUNNING"])
    breakable.run(["scancel", cut])
    breakable.wait_idle()
    assert set(breakable.run(["srun", "-N3", "hostname"]).stdout.split()) == {"n0", "n1", "n2"}


def test_jobs_outlive_daemons(breakable: Cluster) -> None:
    job = submit(breakable, "-N3", *SLEEP)
    breakable.wait_job(job, ["RUNNING"])
    runs = time.time()
    saved = breakable.files.state / "job_state"
    breakable.run(["scontrol", "update", f"JobId={job}", "Comment=worth-saving"])
    until("the controller to save its state", lambda: saved.stat().st_mtime > runs)
    node = breakable.nodes[0]
    breakable.kill_ctl()
    breakable.kill_slurmd(node)
    with pytest.raises(ClusterError, match="runs already"):
        breakable.start_slurmd(breakable.nodes[1])
    breakable.start_slurmd(node)
    breakable.start_ctl()
    assert breakable.job(job)["JobState"] == "RUNNING"
    assert breakable.job(job)["Restarts"] == "0"
    breakable.run(["scancel", job])
    breakable.wait_idle()


# ---------------------------------------------------------------------- other modes, accounting


def test_ports(tmp_path: Path) -> None:
    needs_slurm()
    with Cluster(nodes=2, gpus_per_node=1, mode="ports") as cluster:
        names = cluster.run(["srun", "-N2", "--gpus=2", "sh", "-c", "echo $SLURMD_NODENAME"])
        assert sorted(names.stdout.split()) == cluster.nodes == ["127.0.0.2", "127.0.0.3"]
        with pytest.raises(ClusterError, match="mode ports"):
            cluster.cut(cluster.nodes[0])
        # A rank that puts itself in a session of its own outlives its job, but not the cluster.
        pid = tmp_path / "pid"
        script = f"setsid sh -c 'echo $$ > {pid}; exec env -i sleep 600' & wait"
        submit(cluster, "--wrap", script)
        until("the job", lambda: pid.exists() and pid.read_text())
    assert not processes.alive(int(pid.read_text()))
    assert not cluster.files.root.exists()


def test_an_ordinary_user() -> None:
    """Who has no rights here, hence a copy of the tool where anybody can read it."""
    needs_slurm()
    if os.getuid() != 0:
        pytest.skip("takes root to become somebody else")
    if reason := cannot_be_had_by_nobody():
        pytest.skip(reason)
    place = Path(f"/tmp/dtrain-tool-{os.getpid()}")
    shutil.copytree(TOOL, place / "cluster")
    script = (
        "from cluster import Cluster\n"
        "with Cluster(nodes=2, gpus_per_node=2) as c:\n"
        "    assert c.spec.mode == 'userns', c.spec.mode\n"
        "    print(c.run(['srun', '-N2', '--gpus-per-node=1', 'hostname']).stdout)\n"
    )
    try:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", script],
            user="nobody", group="nogroup", extra_groups=[],
            cwd=place, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(place)
    assert sorted(done.stdout.split()) == ["n0", "n1"], done.stderr


def cannot_be_had_by_nobody() -> str | None:
    try:
        pwd.getpwnam("nobody")
        new_enough = "import sys; assert sys.version_info >= (3, 11)"
        trials = (["/usr/bin/python3", "-c", new_enough], ["unshare", "-Urn", "true"])
        for trial in trials:
            subprocess.run(trial, user="nobody", check=True, cwd="/", capture_output=True)
    except (KeyError, OSError, subprocess.CalledProcessError) as error:
        return f"nobody cannot do that here: {error}"
    return None


def test_accounting() -> None:
    needs_slurm(accounting=True)
    with Cluster(nodes=2, accounting=True) as cluster:
        job = submit(cluster, "--wait", "--wrap", "srun true")
        ask = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "state,exitcode"]
        until("its row", lambda: cluster.run(ask).stdout.strip() == "COMPLETED|0:0")


# ---------------------------------------------------------------------- nothing left


@pytest.mark.parametrize("mode", ["auto", "ports"])
def test_kill_9_of_the_starter(mode: str) -> None:
    needs_slurm()
    script = (
        f"import sys, time; sys.path.insert(0, {str(TOOL.parent)!r})\n"
        "from cluster import Cluster\n"
        f"c = Cluster(nodes=2, mode={mode!r}).start()\n"
        "c.run(['sbatch', '-N2', '-o', '/dev/null', '--wrap', 'srun sleep 600'])\n"
        "print(c.files.root, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        directory = Path(starter.stdout.readline().strip())
        pids = processes_of(directory)
        assert len(pids) > 4
        starter.kill()
    until("all its processes to end", lambda: not any(map(processes.alive, pids)))
    assert not processes_of(directory)
    until("its directory to be removed", lambda: not directory.exists())


def test_up_and_down() -> None:
    needs_slurm()
    directory = Path(f"/tmp/dtrain-up-{os.getpid()}")
    with subprocess.Popen(
        [sys.executable, TOOL, "up", directory, "--nodes", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as up:  # fmt: skip
        assert up.stdout is not None
        assert up.stdout.readline().startswith("Slurm is up: 1 nodes")
        done = tool("exec", directory, "--", "sh", "-c", "sinfo -h -p main -o %T; pwd; exit 3")
        assert (done.returncode, done.stdout.split()) == (3, ["idle", os.getcwd()])
        assert "slurmd-" in tool("status", directory).stdout
        assert f"export SLURM_CONF={directory}/etc/slurm.conf" in tool("env", directory).stdout
        assert "no node 'n7': there are" in tool("cut", directory, "n7").stderr
        assert "runs in" in tool("up", directory).stderr
        up.send_signal(signal.SIGINT)
        assert up.wait(20) == 0
    assert not directory.exists()
    assert not processes_of(directory)
    assert tool("down", directory).stderr == f"slurm/cluster: no cluster runs in {directory}\n"


# ---------------------------------------------------------------------- errors are for people


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["up", "/tmp/" + "long" * 20], "the directory's path is too long"),
        (["up", "/usr"], "holds other things"),
        (["up", "--nodes", "0"], "from 1 to 100"),
        (["up", "--node", "far-too-long CPUs=2"], "a name of at most 9 small letters"),
        (["up", "--node", "n1"], "then what it claims"),
        (["up", "--mode", "ports", "--node", "n1 CPUs=2"], "not mode ports"),
        (["exec", "/tmp/none", "--", "true"], "no cluster runs in /tmp/none"),
        (["cut", "/tmp/none", "n1"], "no cluster runs in /tmp/none"),
    ],
)
def test_errors(words: list[str], message: str) -> None:
    if "/usr" in words:
        needs_slurm()
    done = tool(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_other_peoples_files_stay() -> None:
    needs_slurm()
    folder = Path(f"/tmp/dtrain-etc-{os.getpid()}")
    (folder / "etc").mkdir(parents=True)
    try:
        with pytest.raises(ClusterError, match=r"holds other things \(etc\)"):
            Cluster(folder).start()
        assert (folder / "etc").exists()
    finally:
        shutil.rmtree(folder)


def test_a_busy_port() -> None:
    needs_slurm()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} is busy"):
            Cluster(nodes=1, mode="ports", port=port).start()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(needs, "_SBIN", "")
    assert "apt-get install --no-install-recommends slurm-wlm munge" in str(missing())
    assert "slurmdbd mariadb-server" in str(missing(accounting=True))
