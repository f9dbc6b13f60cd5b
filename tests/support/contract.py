"""What every launcher must do alike: `LauncherContract`, which each launcher's tests inherit."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Protocol

import pytest

from dtrain.run.rundir import RunDir
from support.launch import (
    alive,
    descendants,
    dtrain,
    listeners,
    metrics,
    of_nodes,
    started,
    the_run,
    wait_for_step,
)

Started = list[subprocess.Popen[str]]


class Launch(Protocol):
    """Launches tests/jobs/tiny on 2 nodes with 2 ranks each; gives the commands while they run."""

    def __call__(
        self, cwd: Path, *arguments: str, **env: str
    ) -> AbstractContextManager[Started]: ...


@dataclass(frozen=True)
class Way:
    """How a launcher is asked, and what the workers are to find in their environment."""

    launch: Launch
    names: tuple[str, ...]
    """Node names; the host's own where it is empty."""
    address: str = "127.0.0.1"
    interface: str = "lo"


def finish(processes: Started, timeout: float = 90) -> list[str]:
    return [process.communicate(timeout=timeout)[0] for process in processes]


def files_with(secret: str, run: RunDir) -> list[Path]:
    files = [path for path in run.path.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]


RUN_ID = f"contract-{os.getpid()}"
"""Each test worker has its own: the port follows from it, and several launches run at once."""


def printed_plan(cwd: Path, launched: subprocess.Popen[str]) -> object:
    """What `dtrain plan --json` prints where `dtrain launch` was given the same."""
    command = [str(part) for part in launched.args]  # type: ignore[union-attr]
    given = command[command.index("launch") + 1 :]
    printed = dtrain("plan", "--json", *given, cwd=cwd)
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout)["plan"]


class LauncherContract:
    """Inherit it, and bring a fixture `way`. On every launcher the first test starts cold."""

    @pytest.mark.cold
    def test_it_trains_on_the_asked_ranks_with_the_agreed_environment(
        self, tmp_path: Path, way: Way
    ) -> None:
        foreign = {"SLURM_JOB_ID": "7", "MASTER_ADDR": "elsewhere", "PET_NNODES": "9", "LEVEL": "3"}
        secret = token_hex(16)
        arguments = (
            "--set", f"args.env_to={tmp_path}", "--env", "LEVEL=5", "--env", f"MY_TOKEN={secret}",
            "--run-id", RUN_ID, "--env", "PYTHONHASHSEED=77", "--env", f"DB=postgres://me:{secret}@host/x",
        )  # fmt: skip
        with way.launch(tmp_path, *arguments, **foreign) as processes:
            outputs = finish(processes)
            assert [process.returncode for process in processes] == [0] * len(processes), outputs
        run = the_run(tmp_path)
        assert json.loads(run.plan.read_text()) in [printed_plan(tmp_path, p) for p in processes]
        envs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
        for rank, env in enumerate(envs):
            expected = {
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank % 2),
                "LOCAL_WORLD_SIZE": "2",
                "GROUP_RANK": str(rank // 2),
                "NODE_RANK": str(rank // 2),
                "MASTER_ADDR": way.address,
                "TORCHELASTIC_RESTART_COUNT": "0",
                "PYTHONUNBUFFERED": "1",
                "PYTHONHASHSEED": "77",
                "GLOO_SOCKET_IFNAME": way.interface,
                "LEVEL": "5",
                "MY_TOKEN": secret,
                "DB": f"postgres://me:{secret}@host/x",
                "DTRAIN_NODE_NAME": way.names[rank // 2] or os.uname().nodename,
            }
            assert {name: env.get(name) for name in expected} == expected
            assert int(env["OMP_NUM_THREADS"]) >= 1
            assert not {"SLURM_JOB_ID", "PET_NNODES", "OPENBLAS_NUM_THREADS"} & set(env)
        assert len({env["MASTER_PORT"] for env in envs}) == 1
        assert len({env["a hash"] for env in envs}) == 1, "the order of a set differs"
        assert set(run.rank_logs(0)) == {0, 1, 2, 3}
        assert [line["step"] for line in metrics(run)] == list(range(1, 13))
        assert not files_with(secret, run)
        status = json.loads(dtrain("status", "--json", cwd=tmp_path).stdout)
        assert (status["state"], status["exit_code"], status["step"]) == ("succeeded", 0, 12)
        assert len(status["parameters_sha256"]) == 64

    def test_a_failure_is_named_on_every_console(self, tmp_path: Path, way: Way) -> None:
        arguments = ("--set", "args.misbehave=exit", "--set", "args.rank=2")
        with way.launch(tmp_path, *arguments) as processes:
            outputs = finish(processes)
            for process, output in zip(processes, outputs, strict=True):
                assert process.returncode == 3, output
                (headline,) = [line for line in output.splitlines() if line.startswith("FAILED")]
                assert headline.startswith("FAILED: rank 2 on node 1 (")
                assert headline.endswith("): sys.exit(3)  [failure.exit]")
                assert "Traceback" not in output

    def test_cancel_ends_all_of_it_in_order_and_resume_goes_on(
        self, tmp_path: Path, way: Way
    ) -> None:
        arguments = ("--set", "train.steps=400", "--set", "args.pause=0.05")
        with way.launch(tmp_path, *arguments) as processes:
            run = wait_for_step(tmp_path, 3)
            below = [child for process in processes for child in descendants(process.pid)]
            addresses = listeners(of_nodes(run))
            assert way.address in addresses
            assert not addresses & {"0.0.0.0", "::"}
            running = dtrain("status", cwd=tmp_path).stdout
            assert "running" in running
            refused = dtrain("resume", cwd=tmp_path)
            assert refused.returncode == 2
            assert f"run {run.id} is held by" in refused.stderr
            cancelled = json.loads(dtrain("cancel", "--json", "last", cwd=tmp_path).stdout)
            assert cancelled == {"id": run.id, "was": "running", "state": "cancelled"}
            finish(processes, 30)
            assert not any(map(alive, below))
        reached = metrics(run)[-1]["step"]
        assert 3 <= reached < 400
        end = ("--set", f"train.steps={reached + 4}", "--set", "args.pause=0")
        if len(processes) == 1:
            done = dtrain("resume", *end, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            with ExitStack() as stack:
                again = [
                    stack.enter_context(
                        started("resume", run.id, "--node-rank", str(k), *end, cwd=tmp_path)
                    )
                    for k in range(2)
                ]
                outputs = finish(again)
                assert [process.returncode for process in again] == [0, 0], outputs
        assert [line["step"] for line in metrics(run)] == list(range(1, reached + 5))
        assert run.attempts() == [0, 1]
