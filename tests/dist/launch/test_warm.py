"""A command that is forked from the warm server does what one does that is started cold."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from support import warm
from support.launch import (
    DTRAIN,
    TINY,
    descendants,
    dtrain,
    started,
    the_run,
    wait_for,
    wait_for_step,
)

COMMANDS = {
    "help": ["--help"],
    "an error": ["status", "nix"],
    "wrong usage": ["launch", "--nix"],
    "a plan": ["plan", "--json", "--run-id", "same", "--env", "GIVEN", TINY],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_prints_and_ends_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"GIVEN": "here", "COLUMNS": "77"}
    forked = dtrain(*COMMANDS[name], cwd=tmp_path, env=env)
    monkeypatch.setattr(warm, "is_cold", True)
    cold = dtrain(*COMMANDS[name], cwd=tmp_path, env=env)
    assert (forked.returncode, forked.stdout, forked.stderr) == (
        cold.returncode, cold.stdout, cold.stderr,
    )  # fmt: skip


def test_it_is_forked_and_what_it_starts_is_below_it(tmp_path: Path) -> None:
    with started(
        "launch", "--procs", "2", "--set", "args.pause=0.1", TINY, cwd=tmp_path
    ) as process:
        wait_for_step(tmp_path, 1)
        assert "server.py" in psutil.Process(process.pid).parent().cmdline()[2]
        node, *_ = psutil.Process(process.pid).children()
        assert node.cmdline() == psutil.Process(process.pid).cmdline(), "not a new interpreter"
        assert len(descendants(process.pid)) >= 4  # the node, an agent, two workers
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.cold
def test_a_cold_one_is_a_new_interpreter_and_trains_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for folder, is_cold in ((tmp_path / "cold", True), (tmp_path / "forked", False)):
        folder.mkdir()
        monkeypatch.setattr(warm, "is_cold", is_cold)
        with started("launch", "--procs", "2", TINY, cwd=folder) as process:
            own = wait_for(psutil.Process(process.pid).cmdline, 10)  # exec clears it, then sets it
            assert (own[1:3] == DTRAIN[1:]) == is_cold
            process.communicate(timeout=60)
        status = dtrain("status", the_run(folder).id, "--json", cwd=folder)
        digests.append(json.loads(status.stdout)["parameters_sha256"])
    assert digests[0] == digests[1]


def test_the_programs_pass_signals_and_exit_codes_on(tmp_path: Path) -> None:
    command = warm.programs() / "dtrain"
    done = subprocess.run(
        [command, "status", "nix"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    endless = [command, "launch", "--set", "train.steps=100000", "--set", "args.pause=0.05", TINY]
    with subprocess.Popen(endless, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_for_step(tmp_path, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
