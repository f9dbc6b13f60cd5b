"""Launcher `slurm` on a real cluster: the contract of all launchers, and what only Slurm does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex

import pytest

from cluster import Cluster
from dtrain.launch_plan import LaunchPlan
from dtrain.report import history as report
from dtrain.run import failures
from dtrain.run.attempts import Handle
from dtrain.run.rundir import RunDir
from support.contract import LauncherContract, Started, Way
from support.errors import assert_named, assert_shown
from support.launch import (
    DIGITS,
    DTRAIN,
    OFTEN,
    SLOW,
    TINY,
    dtrain,
    events,
    metrics,
    recorded,
    started,
    status,
    the_run,
    until,
    wait_for_step,
)
from support.lightning_kill import in_both_ways, killed_in_mid_epoch
from support.programs import KINDS, restarts_on, trains_as_one_process
from support.slurm_cluster import TWO, by_submitit, goes_on, job_of, once, sha, submit


class TestContract(LauncherContract):
    @pytest.fixture
    def way(self, slurm: Cluster) -> Way:
        @contextmanager
        def launch(cwd: Path, *arguments: str, **env: str) -> Iterator[Started]:
            with started("launch", *TWO, *arguments, TINY, cwd=cwd, env=env) as process:
                yield [process]

        if slurm.spec.mode == "ports":
            return Way(launch, ("127.0.0.2", "127.0.0.3"))
        return Way(launch, ("n0", "n1"), address="10.77.1.1", interface="eth0")


# ---------------------------------------------------------------------- the same training


def test_digits_on_two_nodes_is_the_training_of_one_machine(slurm: Cluster, tmp_path: Path) -> None:
    shorter = ("--set", "train.steps=20", "--procs", "2", "--nodes", "2", DIGITS)
    made = {}
    by_submitit()
    for launcher in ("local", "slurm", "by-submitit"):
        made[launcher] = recorded(tmp_path / launcher, "--launcher", launcher, *shorter)
    here, local = made.pop("local")
    for there, remote in made.values():
        assert local.last_step == remote.last_step == 20
        assert [local.ids(step) for step in range(1, 21)] == [remote.ids(s) for s in range(1, 21)]
        assert status(here)["parameters_sha256"] == status(there)["parameters_sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_and_a_program_that_is_not_python(
    slurm: Cluster, tmp_path: Path, kind: str
) -> None:
    where = ("--launcher", "slurm", "--nodes", "2", "--procs", "1")
    restarts_on(where, tmp_path, kind)


def test_a_compiled_model_in_two_copies_of_two_parts_is_the_same_training(
    slurm: Cluster, tmp_path: Path
) -> None:
    settings = ("train.compile=true", "train.activation_checkpointing=true", "fsdp.replicas=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    where = (*TWO, "--strategy", "fsdp", *sets)
    trains_as_one_process(where, tmp_path, DIGITS, ("loss",))


@in_both_ways
def test_a_lightning_module_is_killed_and_goes_on(slurm: Cluster, tmp_path: Path, way: str) -> None:
    def kill_rank(_run: RunDir, pid: int) -> None:
        slurm.run(["kill", "-KILL", str(pid)], host="n1")

    two = ("--launcher", "slurm", "--nodes", "2", "--procs", "1")
    killed_in_mid_epoch(tmp_path, way, *two, kill_rank=kill_rank)


def left_and_resumed(run: RunDir, reason: str) -> None:
    (left,) = events(run, "stopped")
    assert left["reason"] == reason, left
    first, second = events(run, "training_started")
    assert first["resumed_from"] is None
    assert second["resumed_from"] == left["step"] >= 5


def test_a_preempted_run_saves_and_goes_on(slurm: Cluster, tmp_path: Path, unbroken: str) -> None:
    def disturb(run: RunDir) -> None:
        slurm.run(
            ["sbatch", "-o", "/dev/null", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1"]
        )

    run, output = goes_on(tmp_path, disturb, "-p", "low")
    left_and_resumed(run, "SIGUSR2")  # this cluster has preempt_send_user_signal
    assert sha(run) == unbroken
    assert "pending" in output


def test_a_run_that_is_requeued_by_hand_goes_on(
    slurm: Cluster, tmp_path: Path, unbroken: str
) -> None:
    run, _ = goes_on(tmp_path, lambda run: void(slurm, "scontrol", "requeue", job_of(run)))
    left_and_resumed(run, "SIGTERM")
    assert sha(run) == unbroken
    history = report.read(run)
    kinds = [span.kind for span in history.timeline.spans]
    first, second = (k for k, kind in enumerate(kinds) if kind == "training")
    assert "queued" in kinds[:first]
    assert "queued" in kinds[first:second]  # a job that is requeued waits at least its BeginTime
    assert history.phases.ranks == [0, 1, 2, 3]


def test_a_run_moves_from_this_machine_to_the_cluster_and_back(
    slurm: Cluster, tmp_path: Path, unbroken: str
) -> None:
    """Stopped here after step 5, and on the cluster after step 15; it ends here."""
    size = ("--nodes", "2", "--procs", "2")
    with started("launch", *size, *SLOW, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 5)
        process.terminate()
        process.communicate(timeout=60)
    here = LaunchPlan.read(run)
    with started("resume", run.id, "--launcher", "slurm", cwd=tmp_path) as process:
        wait_for_step(tmp_path, 15, 120)
        assert status(run)["launcher"] == "slurm"
        assert LaunchPlan.read(run).options.model_dump()["requeue"] > 0  # the profile's own
        assert dtrain("cancel", run.id, cwd=tmp_path).returncode == 0
        process.communicate(timeout=60)
    done = dtrain("resume", run.id, "--launcher", "local", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    back = LaunchPlan.read(run)
    assert (back.attempt, back.launcher, back.options) == (2, "local", here.options)
    assert sorted({line["step"] for line in metrics(run)}) == list(range(1, 61))
    assert sha(run) == unbroken


def test_an_elastic_run_takes_what_is_free_and_goes_on_at_another_size(
    slurm: Cluster, tmp_path: Path
) -> None:
    way = ("--launcher", by_submitit())
    blocker = submit(slurm, "-N2", "--exclusive", "--wrap", "sleep 600")
    slurm.wait_job(blocker, ["RUNNING"])

    def disturb(run: RunDir) -> None:
        slurm.run(["scancel", blocker])
        slurm.run(["scontrol", "requeuehold", job_of(run)])  # else it takes the first two nodes
        slurm.wait_idle()
        slurm.run(["scontrol", "release", job_of(run)])

    run, _ = goes_on(tmp_path, disturb, *way, "--nodes", "2:4", *OFTEN)
    first, second = events(run, "training_started")
    assert (first["world_size"], second["world_size"]) == (4, 8)
    assert second["resumed_from"] >= 2


def test_a_time_above_the_partitions_limit_is_made_of_several_attempts(
    slurm: Cluster, tmp_path: Path, unbroken: str
) -> None:
    """The limit is 2 minutes, and comes a minute sooner; Slurm looks every 30 s."""

    def disturb(run: RunDir) -> None:
        end = (datetime.now() + timedelta(seconds=60)).isoformat(timespec="seconds")
        slurm.run(["scontrol", "update", f"JobId={job_of(run)}", f"EndTime={end}"])

    slower = ("-p", "short", "-t", "20h", "--set", "args.pause=0.6")  # 36 s: longer than the tick
    run, output = goes_on(tmp_path, disturb, *slower, attempts=None)
    assert_named(output, ["partition short ", "0-00:02:00", "0-20:00:00"])
    again = events(run, "training_started")[1:]
    for left, after in zip(events(run, "stopped"), again, strict=True):
        assert left["reason"] == "SIGUSR2"
        assert after["resumed_from"] == left["step"] > 0
    assert sha(run) == unbroken


def test_a_time_above_the_partitions_limit_of_a_job_without_requeue_is_refused(
    slurm: Cluster, tmp_path: Path
) -> None:
    done = dtrain("launch", *once(tmp_path), "-p", "short", "-t", "5h", TINY, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert "Slurm will never start the job: " in done.stdout
    # whole: the console cuts lines, and of Slurm's two reasons PartitionTimeLimit is the longer
    message = json.loads(dtrain("why", "--json", cwd=tmp_path).stdout)["culprit"]["message"]
    assert "(PartitionTimeLimit)" in message or "(PartitionConfig)" in message
    assert "--time: time: 0-05:00:00" in message


def test_submitted_by_submitit_it_is_requeued_too(
    slurm: Cluster, tmp_path: Path, unbroken: str
) -> None:
    run, _ = goes_on(
        tmp_path,
        lambda run: void(slurm, "scancel", "--signal=USR2", job_of(run)),
        *("--launcher", by_submitit()),
    )
    left_and_resumed(run, "SIGUSR2")
    assert sha(run) == unbroken
    refused = dtrain("launch", "--launcher", "by-submitit", "-p", "nowhere", TINY, cwd=tmp_path)
    assert refused.returncode == 2
    place = "\n  --partition: partition: nowhere"
    assert_shown(refused.stderr, "slurm.partition-invalid", f"  [slurm.partition-invalid]{place}")


def void(slurm: Cluster, *command: str) -> None:
    slurm.run(list(command))


def test_a_run_is_not_requeued_more_often_than_it_may_be(slurm: Cluster, tmp_path: Path) -> None:
    with started("launch", *once(tmp_path), *SLOW, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 5)
        slurm.run(["scancel", "--signal=USR2", job_of(run)])
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "the maximum (option requeue)" in output
    assert dtrain("resume", run.id, "--set", "args.pause=0", cwd=tmp_path).returncode == 0


def test_a_node_that_loses_power_is_replaced(
    breakable: Cluster, tmp_path: Path, unbroken: str
) -> None:
    run, _ = goes_on(tmp_path, lambda run: breakable.power_off("n1"), *OFTEN)
    _, second = events(run, "training_started")
    assert second["resumed_from"] >= 2
    assert events(run, "attempt_started")[1]["nodes"] == ["n0", "n2"]
    assert sha(run) == unbroken


@pytest.mark.parametrize("node", ["n0", "n1"])
def test_ranks_of_a_node_taken_for_dead_end_by_themselves(
    breakable: Cluster, tmp_path: Path, unbroken: str, node: str
) -> None:
    """Their node computes on, and would write into the same run."""
    run, _ = goes_on(tmp_path, lambda run: breakable.cut(node), *OFTEN)
    assert sha(run) == unbroken

    def gone() -> bool:
        listed = breakable.run(["ps", "-eo", "args"], host=node).stdout
        ours = [line for line in listed.splitlines() if "-m dtrain.node" in line]
        return all(line.startswith("srun ") for line in ours)  # Slurm's own, which waits for all

    until(f"the old ranks on {node} to end", gone, 60)


def test_a_node_whose_own_name_is_on_loopback(breakable: Cluster, tmp_path: Path) -> None:
    """As Debian installs it: `127.0.1.1 HOSTNAME` in /etc/hosts of each node."""
    for node in breakable.nodes:
        mine = tmp_path / f"hosts-{node}"
        edit = f"sed 's/^[0-9.]* {node}$/127.0.1.1 {node}/' /etc/hosts > {mine}"
        command = f"{edit} && mount --bind {mine} /etc/hosts && getent hosts {node}"
        assert breakable.run(["bash", "-c", command], host=node).stdout.startswith("127.0.1.1")
    done = dtrain("launch", *TWO, "--set", f"args.env_to={tmp_path}", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    env = json.loads((tmp_path / "0.json").read_text())
    assert (env["MASTER_ADDR"], env["GLOO_SOCKET_IFNAME"]) == ("10.77.1.1", "eth0")


# ---------------------------------------------------------------------- the job's life


@pytest.mark.parametrize("more", [(), ("-p", "short", "-t", "20h")])
def test_what_is_planned_is_what_is_launched(
    slurm: Cluster, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Also with a time limit that the partition cuts."""
    same = (*TWO, *more, "-o", "slurm.hold", "--run-id", "planned", TINY)
    shown = json.loads(dtrain("plan", *same, "--json", cwd=tmp_path).stdout)["plan"]
    done = dtrain("launch", "--detach", *same, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(the_run(tmp_path).plan.read_text()) == shown
    assert len(shown["notes"]) == bool(more)


@pytest.mark.parametrize(
    ("arguments", "reason", "place"),
    [
        (("-p", "nowhere"), "Invalid partition name specified", "--partition: partition: nowhere"),
        (("--gpus", "9"), "Requested node configuration is not available", "--gpus: gpus: 9"),
        (("-o", "slurm.mem-per-cpu=900G"), "Memory specification", "-o slurm.mem-per-cpu: 900G"),
    ],
)
def test_what_slurm_refuses_leaves_no_run(
    slurm: Cluster, tmp_path: Path, arguments: tuple[str, ...], reason: str, place: str
) -> None:
    done = dtrain("launch", "--launcher", "slurm", *arguments, TINY, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert reason in output
    assert place in output
    assert "Traceback" not in output
    assert not list((tmp_path / "runs").iterdir())


def test_a_job_that_slurm_never_starts_is_withdrawn_with_its_reason(
    slurm: Cluster, tmp_path: Path
) -> None:
    done = dtrain("launch", "--launcher", "slurm", "--nodes", "9", TINY, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "(Partition" in output
    assert "--nodes: nodes: 9" in output
    run = the_run(tmp_path)
    assert status(run)["state"] == "failed"
    assert "(Partition" in dtrain("why", cwd=tmp_path).stdout


def test_the_place_of_what_is_refused_is_a_line_of_the_profile(
    slurm: Cluster, tmp_path: Path
) -> None:
    place = tmp_path / "launchers"
    place.mkdir()
    text = "launcher: slurm\nextends: slurm\noptions:\n  partition: nowhere\n"
    (place / "site.yaml").write_text(text)
    done = dtrain("launch", "--launcher", "site", TINY, cwd=tmp_path)
    where = "launchers/site.yaml:4:14: partition: nowhere"
    assert_shown(done.stderr, "slurm.partition-invalid", where)
    done = dtrain("plan", "--launcher", "site", TINY, cwd=tmp_path)
    assert "invalid partition specified: nowhere" in done.stdout
    (place / "site.yaml").write_text(text.replace("nowhere", "main"))
    done = dtrain("plan", "--launcher", "site", TINY, cwd=tmp_path)
    assert "Slurm would accept the job: to start at" in done.stdout


def test_a_detached_run_is_followed_and_cancelled_from_elsewhere(
    slurm: Cluster, tmp_path: Path
) -> None:
    longer = ("--set", "train.steps=600")  # than the next command takes to start
    done = dtrain("launch", "--detach", *TWO, *SLOW, *longer, TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with started("logs", "--follow", cwd=tmp_path) as follower:
        run = wait_for_step(tmp_path, 3)
        assert "running on" in status(run)["slurm"]
        cancelled = json.loads(dtrain("cancel", "--json", "last", cwd=tmp_path).stdout)
        output = follower.communicate(timeout=60)[0]
    assert cancelled == {"id": run.id, "was": "running", "state": "cancelled"}
    assert follower.returncode == 143, output
    assert "step 3/600" in output
    assert events(run, "stopped")


def test_a_waiting_job_says_why_and_can_be_withdrawn(slurm: Cluster, tmp_path: Path) -> None:
    slurm.run(["sbatch", "-o", "/dev/null", "-N4", "--exclusive", "--wrap", "sleep 600"])
    dtrain("launch", "--detach", *TWO, TINY, cwd=tmp_path)
    run = the_run(tmp_path)
    until("a reason", lambda: "nodes to become free" in status(run)["slurm"])
    cancelled = json.loads(dtrain("cancel", "--json", "last", cwd=tmp_path).stdout)
    assert cancelled["state"] == "cancelled"


def test_a_killed_command_does_not_end_its_job(slurm: Cluster, tmp_path: Path) -> None:
    secret = token_hex(16)
    arguments = (*TWO, *SLOW, "--env", f"MY_TOKEN={secret}")
    with started("launch", *arguments, TINY, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    shown = slurm.run(["scontrol", "show", "job", job_of(run)]).stdout
    shown += slurm.run(["scontrol", "write", "batch_script", job_of(run), "-"]).stdout
    assert secret not in shown
    assert f"dtrain run {run.id}" in shown
    assert status(run)["state"] == "running"
    assert dtrain("logs", "--follow", cwd=tmp_path).returncode == 0
    assert status(run)["state"] == "succeeded"
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_job_trains_the_code_of_its_submission(slurm: Cluster, tmp_path: Path) -> None:
    shutil.copytree(TINY.parent, tmp_path / "job")
    job, task = tmp_path / "job" / "job.yaml", tmp_path / "job" / "task.py"
    for snapshot, code in (("on", 0), ("off", 1)):
        shutil.copy(TINY.parent / "task.py", task)
        place = tmp_path / "job" / "launchers"
        place.mkdir(exist_ok=True)
        (place / "site.yaml").write_text(
            f"launcher: slurm\nextends: slurm\noptions:\n  snapshot: {snapshot}\n"
        )
        held = ("-o", "slurm.hold")
        arguments = ("--launcher", "site", "--detach", "--run-id", snapshot, *held)
        done = dtrain("launch", *arguments, job, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        run = RunDir(tmp_path / "runs" / snapshot)
        task.write_text("raise RuntimeError('edited since')\n")
        slurm.run(["scontrol", "release", job_of(run)])
        assert dtrain("logs", "--follow", snapshot, cwd=tmp_path).returncode == code


def test_a_run_starts_after_another(slurm: Cluster, tmp_path: Path) -> None:
    one = ("--launcher", "slurm", "--detach")
    longer = ("--set", "args.pause=0.15")  # than the next command takes to start
    dtrain("launch", *one, "--run-id", "first", *SLOW, *longer, TINY, cwd=tmp_path)
    done = dtrain("launch", *one, "--run-id", "second", "--after", "first", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    second = RunDir(tmp_path / "runs" / "second")
    until("a reason", lambda: "waiting for another job" in status(second)["slurm"])
    assert dtrain("logs", "--follow", "second", cwd=tmp_path).returncode == 0
    first = RunDir(tmp_path / "runs" / "first")
    assert events(first, "finished")[0]["time"] < events(second, "training_started")[0]["time"]


def test_from_inside_another_job(slurm: Cluster, tmp_path: Path) -> None:
    inner = [*DTRAIN, "launch", *TWO, "-p", "main", str(TINY)]
    done = slurm.run(
        ["salloc", "-N1", "srun", "--export=ALL,RANK=7,MASTER_ADDR=nowhere", *inner],
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(the_run(tmp_path))["state"] == "succeeded"


def test_hostile_names(slurm: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "so"; $(touch gone) `x` 100%j\nnext'
    shutil.copytree(TINY.parent, folder)
    name = '--name=a\'b "c"; $(touch gone)'
    comment = "slurm.comment=--slurm"
    done = dtrain(
        "launch", *TWO, name, "-p", "main", "--env", "ODD=$(touch gone)'\"\n;", "--set",
        f"args.env_to={json.dumps(str(folder))}", "job.yaml", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "3.json").read_text())["ODD"] == "$(touch gone)'\"\n;"
    assert not list(tmp_path.rglob("gone"))
    refused = dtrain("plan", *TWO, "-o", comment, "job.yaml", cwd=folder)
    assert_shown(refused.stderr, "slurm.flag-not-allowed", "'comment'", "option comment")


def test_many_jobs_are_shown_by_one_command(slurm: Cluster, tmp_path: Path) -> None:
    """Eight, submitted in a row; `dtrain runs` asks Slurm once for all of them."""
    count = 8
    for number in range(count):
        arguments = ("--detach", "-o", "slurm.hold", "--run-id", f"run-{number}")
        assert not dtrain(
            "launch", "--launcher", "slurm", *arguments, TINY, cwd=tmp_path
        ).returncode
    shim = tmp_path / "bin"
    shim.mkdir()
    real = shutil.which("squeue")
    (shim / "squeue").write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\nexec {real} "$@"\n')
    (shim / "squeue").chmod(0o755)
    env = {"PATH": f"{shim}:{os.environ['PATH']}"}
    listed = dtrain("runs", cwd=tmp_path, env=env).stdout
    assert listed.count("running") == count
    assert (tmp_path / "calls").read_text().count("x") <= 3


def test_the_script_is_clean(slurm: Cluster, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    dtrain("launch", "--detach", "-o", "slurm.hold", *TWO, TINY, cwd=tmp_path)
    script = the_run(tmp_path).slurm / "job.sbatch"
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_agents_without_slurms_commands_are_requeued_too(
    slurm: Cluster, tmp_path: Path, unbroken: str
) -> None:
    """As in a container: its files are another system's, and have no scontrol in them."""
    if os.getuid() != 0:
        pytest.skip("takes root to hide files from the agents")
    hide = "".join(
        f"mount --bind /dev/null {shutil.which(name)}\n"
        for name in ("scontrol", "squeue", "scancel", "sbatch", "srun", "sacct")
    )
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$hidden" ] || hidden=1 exec unshare -m "$0" "$@"\nset -e\n{hide}'
        f'! scontrol --version 2>/dev/null\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "launchers").mkdir()
    text = f"launcher: slurm\nextends: slurm\noptions:\n  python: {python}\n"
    (tmp_path / "launchers" / "boxed.yaml").write_text(text)
    boxed = ("--launcher", "boxed")
    run, _ = goes_on(
        tmp_path, lambda run: void(slurm, "scancel", "--signal=USR2", job_of(run)), *boxed
    )
    left_and_resumed(run, "SIGUSR2")
    assert sha(run) == unbroken


def test_a_job_that_starts_after_the_run_was_resumed_leaves(slurm: Cluster, tmp_path: Path) -> None:
    """Its command was killed between sbatch and noting the job, which nobody knew of after that."""
    held = ("-o", "slurm.hold", "--set", "train.steps=400", "--set", "args.pause=0.05")
    done = dtrain("launch", "--detach", *once(tmp_path), *held, TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = the_run(tmp_path)
    handle, unknown = Handle.read(run), job_of(run)
    assert handle is not None
    replace(handle, job_id=None, identity=None).write(run)
    assert status(run)["state"] == "lost"
    with started("resume", run.id, cwd=tmp_path) as process:
        until("the next attempt's job", lambda: job_of(run) not in ("None", unknown))
        slurm.run(["scontrol", "release", job_of(run)])
        wait_for_step(tmp_path, 3)
        slurm.run(["scontrol", "release", unknown])
        slurm.wait_job(unknown, ["FAILED"])
        reached = status(run)["step"]
        until("further steps", lambda: status(run)["step"] > reached)
        assert not failures.read_all(run, 1)
        assert dtrain("cancel", run.id, cwd=tmp_path).returncode == 0
        process.communicate(timeout=60)
    assert [event["attempt"] for event in events(run, "training_started")] == [1]
