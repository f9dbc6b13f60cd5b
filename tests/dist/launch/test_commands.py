"""runs, status, logs, plan and resume as a person uses them, on one run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.launch_plan import LaunchPlan
from dtrain.run.rundir import RunDir, list_runs
from support.errors import assert_named, assert_shown
from support.launch import DIGITS, TINY, dtrain, events, metrics, started, the_run, wait_for_step

DIGITS_TASK = DIGITS.with_name("task.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one finished run of 2×2 ranks that all say the same."""
    cwd = tmp_path_factory.mktemp("commands")
    done = dtrain(
        "launch", "--nodes", "2", "--procs", "2", "--set", "args.say=hello there", TINY, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (cwd / "console.txt").write_text(done.stdout)
    return cwd


@pytest.fixture
def run(folder: Path) -> RunDir:
    return the_run(folder)


def test_the_console_shows_rank_0_and_folds_the_rest(folder: Path) -> None:
    text = (folder / "console.txt").read_text()
    assert "step 12/12" in text
    assert "evaluation after step 12: loss" in text
    assert text.count("logged: hello there") == 1
    assert text.count("warned: hello there") == 1
    assert "[ranks 0-3] WARNING tiny: logged: hello there" in text
    assert text.count("\nhello there") == 1, "what others print stays in their files"


def test_runs(folder: Path, run: RunDir) -> None:
    lines = dtrain("runs", cwd=folder).stdout.splitlines()
    heads = ["RUN", "STATE", "STEP", "RANKS", "STRATEGY", "LAUNCHER", "STARTED", "DURATION"]
    assert lines[0].split() == [*heads, "METRIC", "SET"]
    assert lines[1].split()[:6] == [run.id, "succeeded", "12", "4", "ddp", "local"]
    (row,) = json.loads(dtrain("runs", "--json", cwd=folder).stdout)
    assert row["id"] == run.id
    assert dtrain("runs", "--runs", "none", cwd=folder).stdout == "no runs in none\n"


@pytest.mark.parametrize("name", ["last", "tiny", "ID", "PATH"])
def test_status_by_any_name(folder: Path, run: RunDir, name: str) -> None:
    name = {"ID": run.id, "PATH": str(run.path)}.get(name, name)
    status = json.loads(dtrain("status", name, "--json", cwd=folder).stdout)
    assert status["id"] == run.id
    assert status["eval"]["loss"] == pytest.approx(metrics(run, "eval")[-1]["loss"])
    assert "state               succeeded\n" in dtrain("status", name, cwd=folder).stdout


def test_an_unknown_run(folder: Path) -> None:
    done = dtrain("status", "nix", cwd=folder)
    assert done.returncode == 2
    assert_shown(done.stderr, "run.not-found", "'nix'")


def test_logs_fold_and_select(folder: Path, run: RunDir) -> None:
    text = dtrain("logs", cwd=folder).stdout
    assert "[ranks 0-3] hello there" in text
    assert text.count("hello there") == 3
    only = dtrain("logs", "--rank", "3", cwd=folder).stdout
    assert "[rank 3] hello there" in only
    assert "[rank 0]" not in only
    node = dtrain("logs", "--node", "1", cwd=folder).stdout
    assert "[ranks 2-3] hello there" in node
    lines = dtrain("logs", "--rank", "1", "--json", cwd=folder).stdout.splitlines()
    assert {"rank": 1, "line": "hello there"} in [json.loads(line) for line in lines]
    missing = dtrain("logs", "--rank", "9", cwd=folder)
    assert missing.returncode == 2
    assert missing.stderr.endswith("; ranks: [0, 1, 2, 3]  [run.no-such-log]\n")
    missing = dtrain("logs", "--node", "5", cwd=folder)
    assert_shown(missing.stderr, "run.no-such-log", "nodes: [0, 1]; ranks: [0, 1, 2, 3]")


def test_logs_of_ranges_of_ranks(folder: Path) -> None:
    def ranks(*chosen: str) -> set[int]:
        done = dtrain("logs", "--json", *chosen, cwd=folder)
        return {json.loads(line)["rank"] for line in done.stdout.splitlines()}

    assert ranks("--rank", "0-1,3") == ranks("--rank", "0-1", "--rank", "3") == {0, 1, 3}
    assert ranks("--node", "0-1", "--rank", "2-900") == {2, 3}
    for wrong in ("x", "1-", "3-1", "", "1,,2"):
        done = dtrain("logs", "--rank", wrong, cwd=folder)
        assert (done.returncode, done.stdout) == (2, ""), wrong


@pytest.mark.parametrize("more", [(), ("--follow",)])
def test_the_last_lines_of_logs(folder: Path, more: tuple[str, ...]) -> None:
    lines = dtrain("logs", cwd=folder).stdout.splitlines()
    for number in (0, 1, 7, 100_000):
        done = dtrain("logs", "--tail", str(number), *more, cwd=folder)
        assert done.returncode == 0
        assert done.stdout.splitlines() == lines[max(0, len(lines) - number) :]


def test_logs_of_an_attempt_that_is_not_there(folder: Path, run: RunDir) -> None:
    for more in ((), ("--follow",)):
        done = dtrain("logs", "--attempt", "3", *more, cwd=folder)
        assert done.returncode == 2
        assert_shown(done.stderr, "run.no-such-attempt", run.id, "attempt 3", "attempt 0")


def test_why_of_a_run_that_did_not_fail(folder: Path, run: RunDir) -> None:
    assert dtrain("why", cwd=folder).stdout == f"run {run.id} has not failed: it succeeded\n"
    assert dtrain("why", "--json", cwd=folder).stdout == "null\n"


def test_a_copy_has_the_job_and_the_options_of_a_run(folder: Path, run: RunDir) -> None:
    planned = dtrain("plan", "--copy", run.id, "--set", "seed=7", "--json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    plan, before = json.loads(planned.stdout)["plan"], LaunchPlan.read(run)
    assert plan["run_id"] != run.id
    assert plan["attempt"] == 0
    same = ("nodes", "procs_per_node", "launcher", "strategy", "world_size")
    assert [plan[name] for name in same] == [getattr(before, name) for name in same]
    assert plan["set_by_flags"] == {**before.set_by_flags, "seed": 7}


def test_a_copy_is_trained_alone(folder: Path, run: RunDir) -> None:
    again = ("--runs", "copies", "--set", "train.steps=3", "-q")
    copied = dtrain("launch", "--copy", str(run.path), *again, cwd=folder)
    assert copied.returncode == 0, copied.stderr
    (copy,) = list_runs(folder / "copies")
    assert copy.id != run.id
    assert [line["step"] for line in metrics(copy)] == [1, 2, 3]
    assert copy.job.read_text() == run.job.read_text()
    (line,) = json.loads(dtrain("runs", "--runs", "copies", "--json", cwd=folder).stdout)
    assert line["set"]["train.steps"] == 3


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["launch"], "usage.missing-argument"),
        (["plan"], "usage.missing-argument"),
        (["launch", "--copy", "last", str(TINY)], "usage.unexpected-argument"),
        (["launch", "--copy", "last", "-m", "pkg"], "usage.unexpected-argument"),
        (["launch", "--copy", "nothing"], "run.not-found"),
        (["launch", "--copy", "last", "--launcher", "nope"], "profile.not-found"),
        (["launch", "--copy", "last", "--account", "a"], "usage.flag-of-other-launcher"),
    ],
)
def test_what_cannot_be_copied(folder: Path, run: RunDir, words: list[str], code: str) -> None:
    done = dtrain(*words, cwd=folder)
    assert done.returncode == 2
    assert_shown(done.stderr, code)
    assert list_runs(folder / "runs")[-1].id == run.id


def test_resume_of_a_finished_run_is_refused(folder: Path, run: RunDir) -> None:
    longer = dtrain("resume", "--dry-run", "--set", "train.steps=20", cwd=folder)
    assert longer.stdout.startswith(f"run        {run.id} (attempt 1): "), longer.stderr
    assert run.attempts() == [0]
    done = dtrain("resume", cwd=folder)
    assert done.returncode == 2
    assert_shown(done.stderr, "run.finished", run.id, "--set train.epochs=20")


def test_gpus_that_are_not_there_are_planned_and_not_launched(tmp_path: Path) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = dtrain("launch", "--gpus", "2", TINY, cwd=tmp_path, env=hidden)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert_shown(done.stderr, "plan.too-few-gpus", "--gpus: 2 GPUs", "none")
    done = dtrain("plan", "--gpus", "2", TINY, cwd=tmp_path, env=hidden)
    assert done.returncode == 0
    assert "this host: 2 GPUs" in done.stdout


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("name=other", "run.setting-without-effect"),
        ("checks.inject=[]", "run.setting-without-effect"),
        ("checkpoint.init_from=runs/one", "run.setting-without-effect"),
        ("args.lr=0.5", "run.finished"),
    ],
)
def test_settings_that_a_resume_cannot_use_are_refused(
    folder: Path, run: RunDir, setting: str, code: str
) -> None:
    new_end = [] if code == "run.finished" else ["--set", "train.steps=20"]
    done = dtrain("resume", "--dry-run", "--set", setting, *new_end, cwd=folder)
    assert done.returncode == 2
    named = run.id if code == "run.finished" else f"--set {setting.partition('=')[0]} "
    assert_shown(done.stderr, code, named)


def test_the_run_directory_has_all_of_it(run: RunDir) -> None:
    for path in (run.job, run.resolved, run.plan, run.handle(0), run.metrics, run.events, run.code):
        assert path.exists(), path
    assert run.job.read_text() == TINY.read_text()
    assert json.loads((run.code / "git.json").read_text())["git"] in (True, False)
    assert not run.secret_env(0).exists()


def test_follow_ends_with_the_run_and_with_its_code(tmp_path: Path) -> None:
    arguments = ("--set", "args.misbehave=exit", "--set", "args.at=20", "--set", "args.pause=0.05",
                 "--set", "train.steps=100")  # fmt: skip
    with started("launch", "--procs", "2", *arguments, TINY, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 2)
        followed = dtrain("logs", "--follow", cwd=tmp_path)
        process.communicate(timeout=30)
    assert followed.returncode == process.returncode == 3
    assert "step 2/100" in followed.stdout
    assert "step 19/100" in followed.stdout
    status = dtrain("status", cwd=tmp_path).stdout
    run = the_run(tmp_path)
    assert "\nstate               failed\nwhy                 rank 1 on node 0 (" in status
    assert f"; `dtrain why {run.id}` shows more\n" in status
    assert "\nstep                19 of 100 (19 %)\n" in status


def test_status_of_a_running_run_says_when_it_will_end(tmp_path: Path) -> None:
    arguments = (
        "--set",
        "args.pause=0.05",
        "--set",
        "train.steps=2000",
        "--env",
        "MY_TOKEN=s3cret",
    )
    with started("launch", "--procs", "2", *arguments, TINY, cwd=tmp_path) as process:
        wait_for_step(tmp_path, 4)
        row = json.loads(dtrain("status", "--json", cwd=tmp_path).stdout)
        text = dtrain("status", cwd=tmp_path).stdout
        (line,) = dtrain("runs", cwd=tmp_path).stdout.splitlines()[1:]
        # Ctrl-C between two lines of metrics: the last step that was done is told
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert row["total_steps"] == 2000
    assert row["eta"] > time.time()
    assert 0 < row["samples_per_second"] == row["train"]["samples_per_second"]
    assert row["set"]["launch.env.MY_TOKEN"] == "(set, not shown)"
    assert re.search(r"\nstep +\d+ of 2000 \(\d %\)\n", text)
    assert re.search(r"\neta +\d{4}-\d\d-\d\d [\d:]+, in 0:0\d:\d\d\n", text)
    assert re.search(
        r" running +\d+/2000 .* loss [\d.]+ +args\.pause=0\.05 train\.steps=2000", line
    )
    ended = json.loads(dtrain("status", "--json", cwd=tmp_path).stdout)
    assert ended["state"] == "cancelled"
    stopped = [each for each in events(the_run(tmp_path)) if each["event"] == "stopped"]
    assert ended["step"] == stopped[-1]["step"] == metrics(the_run(tmp_path))[-1]["step"]


def in_shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`dtrain COMMAND` as a shell runs it; the exit code is dtrain's."""
    text = f"{sys.executable} -m dtrain {command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", text], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", ["logs", "status", f"plan {TINY}", "--help"])
def test_a_reader_that_leaves_is_no_error(folder: Path, command: str) -> None:
    done = in_shell(f"{command} | true", folder)
    assert done.returncode in (0, 128 + 13)  # 0 when it was quicker than its reader
    assert done.stderr == ""


def test_a_full_console_is_told_in_a_line(folder: Path) -> None:
    for command in ("status", "--help"):
        done = in_shell(f"{command} > /dev/full", folder)
        assert done.returncode == 1
        assert done.stderr == "dtrain: cannot print: No space left on device  [file.console-gone]\n"


def test_a_training_goes_on_when_nobody_reads_or_the_console_is_full(tmp_path: Path) -> None:
    read = in_shell(f"launch --run-id read {TINY} | head -1", tmp_path)
    full = in_shell(f"launch --run-id full {TINY} > /dev/full", tmp_path)
    assert (read.returncode, full.returncode) == (0, 0), read.stderr + full.stderr
    assert read.stderr + full.stderr == ""
    for run in (RunDir(tmp_path / "runs" / name) for name in ("read", "full")):
        assert [step["step"] for step in metrics(run)] == list(range(1, 13))
        assert json.loads(run.result(0).read_text())["state"] == "succeeded"


def test_plan_starts_and_writes_nothing(tmp_path: Path) -> None:
    before = dict(os.environ)
    plan = dtrain("plan", "--nodes", "2", "--procs", "2", "--env", "MY_TOKEN=s3cret", "--explain",
                  TINY, cwd=tmp_path, env={"X": "1"})  # fmt: skip
    dry = dtrain("launch", "--dry-run", "--explain", "--nodes=2", "--nproc-per-node", "2",
                 "--set", "launch.join-timeout=77s", TINY, cwd=tmp_path)  # fmt: skip
    assert (plan.returncode, dry.returncode) == (0, 0), plan.stderr + dry.stderr
    assert os.listdir(tmp_path) == []
    assert "s3cret" not in plan.stdout
    assert "MY_TOKEN=(set, not shown)" in plan.stdout
    assert "node 1     node-1: ranks 2-3" in dry.stdout
    assert "-m dtrain.node" in dry.stdout
    assert "nodes wait 77 s" in dry.stdout
    assert "where each value came from" in dry.stdout
    assert before == dict(os.environ)


def test_launch_executes_the_plan_that_was_printed(tmp_path: Path) -> None:
    arguments = ("--run-id", "planned", "--procs", "2", TINY)
    dry = dtrain("launch", "--dry-run", "--json", *arguments, cwd=tmp_path)
    printed = json.loads(dry.stdout)["plan"]
    assert printed == json.loads(dtrain("plan", "--json", *arguments, cwd=tmp_path).stdout)["plan"]
    assert dtrain("launch", "-q", *arguments, cwd=tmp_path).returncode == 0
    run = RunDir(tmp_path / "runs" / "planned")
    assert json.loads(run.plan.read_text()) == printed
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for command in (("launch",), ("plan", "--write")):
        again = dtrain(*command, "--set", "seed=5", *arguments, cwd=tmp_path)
        assert again.returncode == 2
        names = ("run planned ", "dtrain resume planned", "--run-id")
        assert_shown(again.stderr, "run.exists", *names)
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_the_torchrun_line_works_as_printed(tmp_path: Path) -> None:
    arguments = ("--launcher", "torchrun", "--procs", "2", "--run-id", "by-hand", TINY)
    printed = dtrain("plan", "--write", *arguments, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    (line,) = [each.strip() for each in printed.stdout.splitlines() if " torchrun " in each]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with started("logs", "--follow", "by-hand", cwd=tmp_path) as follow:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PATH": path}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        followed, _ = follow.communicate(timeout=30)
    assert follow.returncode == 0, followed
    assert "step 12/12" in followed
    status = json.loads(dtrain("status", "by-hand", "--json", cwd=tmp_path).stdout)
    assert (status["state"], status["exit_code"], status["step"]) == ("succeeded", 0, 12)
    run = RunDir(tmp_path / "runs" / "by-hand")
    assert [step["step"] for step in metrics(run)] == list(range(1, 13))
    assert "step 12/12" in done.stdout
    assert set(run.rank_logs(0)) == {0, 1}
    mixed = dtrain("launch", "--run-id", "by-hand", TINY, cwd=tmp_path)
    assert mixed.returncode == 2
    assert_shown(mixed.stderr, "run.exists", "by-hand")


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["--set", "train.global_batch_sise=3"], "job.unknown-field", "'global_batch_size'?"),
        (["--strategy", "dpp"], "job.unknown-name", "ddp"),
        (["--strategy", "single", "--procs", "2"], "plan.single-is-one-process", "not 2"),
        (["--nodes", "two"], "job.invalid-value", "--nodes: "),
        (["--launcher", "slum"], "profile.not-found", "--launcher slum: "),
        (["--run-id", "../x"], "usage.run-id", "--run-id '../x'"),
        (["--name", ""], "job.invalid-value", "--name: "),
        (["--json"], "usage.flag-without-effect", "--dry-run"),
        (["--env", "NIX_X"], "usage.variable-not-set", "--env NIX_X=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, arguments: list[str], code: str, name: str
) -> None:
    done = dtrain("launch", *arguments, TINY, cwd=tmp_path)
    assert done.returncode == 2
    assert_named(done.stderr, [code, name])
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_module_that_is_missing_here_is_reported_where_the_launch_is_here(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("import torch\nimport no_such_module\nclass T: ...\n")
    job = tmp_path / "job.yaml"
    job.write_text("{name: t, task: 'task.py:T', train: {steps: 1, global_batch_size: 1}}")
    done = dtrain("launch", job, cwd=tmp_path)
    assert done.returncode == 2
    assert_shown(done.stderr, "job.missing-import", "dtrain: task.py:2:1: ", "no_such_module")
    assert not (tmp_path / "runs").exists()
    elsewhere = dtrain("plan", "--launcher", "slurm", job, cwd=tmp_path)  # with its own Python
    assert elsewhere.returncode == 0, elsewhere.stderr


@pytest.mark.parametrize(
    "arguments",
    [["lanch"], ["launch"], ["launch", "--nodez", "2", "x"], ["launch", str(DIGITS_TASK)]],
)
def test_usage_errors_are_2(tmp_path: Path, arguments: list[str]) -> None:
    done = dtrain(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if arguments == ["lanch"]:
        assert_shown(done.stderr, "usage.unknown-command", "'launch'")
    if arguments[-1] == str(DIGITS_TASK):
        assert_shown(done.stderr, "job.script-only-defines", f"dtrain launch {DIGITS}")
