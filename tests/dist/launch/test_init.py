"""What `dtrain init` writes is launched at once; on a terminal it asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from support import EXAMPLES
from support.launch import dtrain, metrics, status, the_run
from support.terminal import terminal

SCRIPT = """\
import sys
import torch.distributed as dist
dist.init_process_group("gloo")
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {sys.argv[1:]}")
dist.destroy_process_group()
"""
MAIN = """

if __name__ == "__main__":
    trainer = pl.Trainer(max_epochs=1, devices=2, accelerator="cpu", callbacks=[])
    trainer.fit(LitDigits(width=4), datamodule=DigitsData())
"""


@pytest.fixture(autouse=True)
def without_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def init_and_launch(cwd: Path, *arguments: str) -> str:
    """Run init, and then the launch of its last line; return what init printed."""
    done = dtrain("init", "--launcher", "local", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1].partition("#")[0].split()
    assert command[:2] == ["dtrain", "launch"]
    launched = dtrain(*command[1:], cwd=cwd)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return done.stdout


def test_a_first_task(tmp_path: Path) -> None:
    init_and_launch(tmp_path, "--procs", "2")
    run = the_run(tmp_path)
    assert status(run)["state"] == "succeeded"
    assert metrics(run, "eval")[-1]["accuracy"] > 0.9
    assert len(list((run.path / "attempts" / "0" / "node-0").glob("rank-*.log"))) == 2


def test_a_torchrun_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    line = "torchrun --nproc-per-node 2 --tee 3 train.py --lr 0.1"
    text = init_and_launch(tmp_path, "--from", line)
    assert "not carried over: --from: --tee 3: " in text
    log = the_run(tmp_path).path / "attempts" / "0" / "node-0" / "rank-00001.log"
    assert "rank 1 of 2: ['--lr', '0.1']" in log.read_text()


def test_a_lightning_script(tmp_path: Path) -> None:
    module = (EXAMPLES / "lightning" / "module.py").read_text()
    (tmp_path / "digits.py").write_text(module + MAIN)
    text = init_and_launch(tmp_path, "--from", "digits.py")
    assert "callbacks=[]" in text
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert job["train"]["global_batch_size"] == 64, "32 of the loader on each of two"
    run = the_run(tmp_path)
    assert metrics(run)[-1]["step"] == 23
    assert "val_acc" in metrics(run, "eval")[-1]


def test_the_questions_on_a_terminal(tmp_path: Path) -> None:
    with terminal("init", "first", cwd=tmp_path) as shown:
        shown.until("a question", lambda lines: any("Nodes [1]:" in line for line in lines))
        shown.press("none\n")
        shown.until("an error", lambda lines: any("expected a number" in each for each in lines))
        shown.press("2\n")
        asked = "Processes per node ["
        shown.until("a question", lambda lines: any(asked in line for line in lines))
        shown.press("\n")
        assert shown.wait() == 0
    profile = yaml.safe_load((tmp_path / "first" / "launchers" / "local.yaml").read_text())
    assert profile["launch"]["nodes"] == 2
    assert profile["launch"]["procs_per_node"] >= 1


def test_yes_asks_nothing_and_ctrl_d_writes_nothing(tmp_path: Path) -> None:
    with terminal("init", "--yes", "first", cwd=tmp_path) as shown:
        assert shown.wait() == 0
    with terminal("init", "second", cwd=tmp_path) as shown:
        shown.until("a question", lambda lines: any("Nodes [1]:" in line for line in lines))
        shown.press("\x04")
        assert shown.wait() == 130
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
