"""`dtrain.launch` and its `Run`: real launches from Python, driven by a process of their own."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain import driving
from dtrain.errors import JobError, LaunchError, PlanError, RunNotFound, UsageError
from dtrain.run.rundir import RunDir, list_runs
from support import ROOT
from support import launch as cli
from support.errors import raises
from support.launch import TINY, alive, descendants, the_run, until, wait_for_step

SLOW: dict[str, Any] = {
    "args": {"pause": 0.05},
    "train": {"steps": 400},
    "checkpoint": {"every_steps": 2},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> str:
    done = cli.dtrain(*arguments, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_below(folder: Path) -> str:
    """All that files of a directory hold."""
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_a_class_is_launched_and_its_run_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny.task import Tiny

    secret = secrets.token_hex()
    (folder / "env").mkdir()
    run = dtrain.launch(
        Tiny,
        nodes=2,
        procs=2,
        args={"env_to": str(folder / "env")},
        train={"steps": 12, "global_batch_size": 16},
        set={"log.every_steps": 1, "eval.every_steps": 6},
        env={"MY_TOKEN": secret},
    )
    assert run.path.parent == folder / "runs"
    assert run.url is None
    assert repr(run) == f"<dtrain.Run {run.id}: running>"
    kept = {path.name for path in run.path.rglob("*") if path.is_file() and secret in read(path)}
    assert kept <= {".env-0.json"}
    assert not [each for each in descendants(os.getpid()) if secret in cli.command_of(each)]
    assert run.wait() == 0
    shown = capsys.readouterr().out
    assert f"{run.id}: ddp by local, 4 ranks on 2 nodes" in shown
    assert "step 12/12" in shown
    assert f"{run.id}: succeeded in" in shown
    assert run.wait() == run.stop() == 0
    assert repr(run) == f"<dtrain.Run {run.id}: succeeded>"
    assert secret not in text_below(run.path)
    environment = json.loads((folder / "env" / "3.json").read_text())
    assert secret in json.dumps(environment)

    assert run.status() == json.loads(command("status", "--json"))
    assert run.logs() + "\n" == command("logs")
    assert run.logs(rank=3) + "\n" == command("logs", "--rank", "3")
    assert run.why() is None
    metrics = run.metrics("train")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert len(run.metrics()) == 14
    assert metrics.to_pandas()["loss"].tolist() == [line["loss"] for line in metrics]
    with run.directory.metrics.open("a") as file:
        file.write('{"split": "train", "step": 13, "loss": null}\n')
    assert math.isnan(run.metrics("train")[-1]["loss"])
    for name in ("last", run.id, run.id[:-1], str(run.path)):
        assert dtrain.Run.find(name).path == run.path
    assert [each.id for each in dtrain.runs()] == [run.id]

    with raises("run.no-such-log", "attempt 0", run.id, "[0, 1, 2, 3]", kind=RunNotFound):
        run.logs(rank=9)
    with raises("run.exists", run.id, "dtrain resume", kind=UsageError):
        dtrain.launch(TINY, run_id=run.id)  # the driver finds that out
    with raises("run.finished", run.id, "--set train.epochs=", kind=UsageError):
        dtrain.resume(run)


def read(path: Path) -> str:
    return path.read_text(errors="replace")


def test_a_failure_is_explained_and_resumed() -> None:
    with dtrain.launch(TINY, procs=2, args={"misbehave": "raise"}) as run:
        assert run.why() is None
    why = run.why()
    assert why is not None
    assert f"{why}\n" == f"{why!r}\n" == command("why")
    assert (why.culprit.rank, why.culprit.type) == (1, "ValueError")
    assert why.to_json() == json.loads(command("why", "--json"))
    again = dtrain.resume(run, procs=1, set={"args.misbehave": None})
    assert again.path == run.path
    assert again.wait(progress=False) == 0
    assert run.status()["attempt"] == 1
    assert run.why() is None
    assert str(run.why(attempt=0)) == str(why)
    assert "does not like this batch" in run.logs(attempt=0)


def test_an_exception_in_the_block_stops_the_run(folder: Path) -> None:
    def fail(run: dtrain.Run) -> None:
        with run:
            wait_for_step(folder, 3)
            raise ZeroDivisionError

    run = dtrain.launch(TINY, procs=2, **SLOW)
    with pytest.raises(TimeoutError, match=run.id):
        run.wait(timeout=0.1)
    for again in (lambda: dtrain.launch(TINY, run_id=run.id), lambda: dtrain.resume(run)):
        with raises("run.held", f"run {run.id} ", kind=UsageError):
            again()
    with pytest.raises(ZeroDivisionError):
        fail(dtrain.Run.find(run.id))  # another `Run` of it, in the process that drives it
    assert run.status()["state"] == "cancelled"
    assert run.wait() == 128 + signal.SIGTERM
    saved = max(path.name for path in run.directory.checkpoints.iterdir())
    assert int(saved.removeprefix("step-")) >= 3
    log = read(run.directory.driver_log(0, [0]))
    assert "stopping at the next step" in log


SCRIPT = """
import sys
import dtrain

if __name__ == "__main__":
    sections = {sections}
    run = dtrain.launch({job!r}, procs=2, **sections)
    print("launched", flush=True)
    {then}
"""


def script(folder: Path, then: str) -> subprocess.Popen[str]:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(sections=SLOW, job=str(TINY), then=then))
    return subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def test_ctrl_c_stops_in_order_and_is_raised(folder: Path) -> None:
    with script(folder, "run.wait()") as process:
        run = wait_for_step(folder, 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "stopping at the next step" in out
    assert f"dtrain resume {run.id}" in out
    assert cli.status(run)["state"] == "cancelled"
    assert [*run.checkpoints.iterdir()]


@pytest.mark.parametrize("end", ["killed", "left"])
def test_a_program_that_is_gone_leaves_no_process(folder: Path, end: str) -> None:
    wait = "import os, pathlib, time\n    while not pathlib.Path('go').exists(): time.sleep(0.02)"
    with script(folder, wait) as process:
        run = wait_for_step(folder, 3)
        below = descendants(process.pid)
        assert len(below) >= 4  # driver, node, agent and workers
        if end == "killed":
            process.kill()
        else:
            (folder / "go").touch()
        _, err = process.communicate(timeout=30)
        until("the end of all processes", lambda: not any(map(alive, below)))
    if end == "left":
        assert process.returncode == 0
        assert f"run {run.id} is stopped, because the program that launched it ends" in err
    assert cli.status(run)["state"] == "cancelled"
    assert "the process that launched this run has ended" in read(run.driver_log(0, [0]))


def test_a_run_whose_driver_was_killed_is_lost(folder: Path) -> None:
    before = descendants(os.getpid())
    run = dtrain.launch(TINY, procs=2, args={"pause": 0.05}, train={"steps": 500})
    wait_for_step(folder, 2)
    driver = driving.driver_of(run.path)
    assert driver is not None
    started = [pid for pid in descendants(os.getpid()) if pid not in before]
    driver.kill()
    assert [run.wait(progress=False) for _ in range(2)] == [1, 1]
    assert run.status()["state"] == "lost"
    until("the end of all processes", lambda: not any(map(alive, started)))


def test_a_second_interrupt_kills(folder: Path) -> None:
    run = dtrain.launch(TINY, procs=2, args={"misbehave": "hang", "at": 2}, train={"steps": 50})
    wait_for_step(folder, 1)
    own = os.getpid()

    def interrupt() -> None:
        os.kill(own, signal.SIGINT)
        log = run.directory.driver_log(0, [0])
        until("the request to stop", lambda: "again to kill" in read(log))
        os.kill(own, signal.SIGINT)

    thread = threading.Timer(0.3, interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    thread.join()
    assert run.status()["state"] == "cancelled"


def test_nothing_is_started_where_the_plan_is_refused(folder: Path) -> None:
    before = descendants(os.getpid())
    with raises("file.not-found", "nowhere.yaml: ", kind=JobError):
        dtrain.launch("nowhere.yaml")
    with raises("plan.single-is-one-process", "'single'", "not 2", "'ddp'", kind=PlanError):
        dtrain.launch(TINY, strategy="single", procs=2)
    with raises("usage.detach-unsupported", "'local'", "--detach", kind=UsageError):
        dtrain.launch(TINY, detach=True)
    with raises("run.no-runs", "--runs", kind=RunNotFound):
        dtrain.resume()
    assert not (folder / "runs").exists()
    with raises("launch.not-writable", "/proc/none", "--runs DIR", kind=LaunchError):
        dtrain.launch(TINY, runs="/proc/none")
    assert descendants(os.getpid()) == before


BREAKS = """
import sys
if "dtrain.launchers.driver" in sys.orig_argv:
    from dtrain.launchers import supervise
    def broken(*_): raise ValueError("out of cheese")
    supervise._follow_to_end = broken
"""


def test_a_driver_that_breaks_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sitecustomize.py").write_text(BREAKS)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    names = ("Traceback", "ValueError: out of cheese")
    with raises("launch.driver-ended", *names, kind=LaunchError):
        dtrain.launch(TINY)
    assert "out of cheese" in read(the_run(folder).driver_log(0, [0]))


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    report = dtrain.verify(
        TINY, strategies=["ddp"], procs=[2], only=True, steps=2, set={"train.global_batch_size": 8}
    )
    assert report.same
    (result,) = report.results
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith(result.layout.name)]


CELLS = [
    "import asyncio, os, threading, time\nimport torch\nfrom torch import nn\nimport dtrain",
    "SAMPLES = 64\n\ndef linear(width):\n    return nn.Linear(width, 1)",
    """\
class Regression(dtrain.Task):
    def __init__(self, pause: float = 0.0):
        self.pause = pause
    def model(self):
        return linear(4)
    def train_dataset(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(SAMPLES, 4, generator=generator)
        return torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True))
    def loss(self, model, batch):
        import time
        time.sleep(self.pause)
        x, y = batch
        return nn.functional.mse_loss(model(x), y)
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)
""",
    """\
assert asyncio.get_running_loop().is_running()
train = {"steps": 8, "global_batch_size": 16}
run = dtrain.launch(Regression, train=train, procs=2, log={"every_steps": 1})
run.wait()""",
    "losses = run.metrics().to_pandas()['loss']\nprint(losses.iloc[-1] < losses.iloc[0])\nrun",
    """\
slow = dtrain.launch(Regression, args={"pause": 0.05}, train={**train, "steps": 400}, procs=2,
                     set={"log.every_steps": 1})

def interrupt_when_it_trains():
    while len(slow.metrics()) < 3:
        time.sleep(0.05)
    os.kill(os.getpid(), 2)

threading.Thread(target=interrupt_when_it_trains).start()
try:
    slow.wait()
except KeyboardInterrupt:
    print("interrupted,", slow.status()["state"])""",
    "data = torch.ones(3)\nclass Wrong(Regression):\n    def model(self): return data\n"
    "try: dtrain.launch(Wrong, train=train)\nexcept dtrain.errors.UsageError as e: print(e)",
]


def test_in_a_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    from nbformat import v4

    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = v4.new_notebook(cells=[v4.new_code_cell(text) for text in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(folder))
    output = [texts(cell) for cell in notebook.cells]
    first, second = list_runs(folder / "runs")
    assert f"{first.id}: succeeded in" in output[3]
    assert "step 8/8 ━━━" in output[3]
    assert "epoch 1  loss" in output[3]
    assert f"True\n<dtrain.Run {first.id}: succeeded>" in output[4]
    assert "interrupted, cancelled" in output[5]
    assert [*second.checkpoints.iterdir()]
    assert "Wrong uses 'data' of the notebook, a Tensor" in output[6]
    assert cells_of(first) == cells_of(second)
    assert "    def loss(self, model, batch):" in (folder / cells_of(first)).read_text()


@pytest.mark.parametrize("name", ["docs/python.md", "README.md"])
def test_the_docs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they show is run, as the cells of a notebook."""
    import nbclient
    from nbformat import v4

    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "tests" / "jobs", folder / "tests" / "jobs")
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)
    shown = [block for block in blocks if name != "README.md" or "dtrain.launch(" in block]
    notebook = v4.new_notebook(cells=[v4.new_code_cell(block) for block in shown])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(folder))
    for cell, block in zip(notebook.cells, shown, strict=True):
        assert ("FAILED: rank 1" in texts(cell)) == ("misbehave" in block)


def texts(cell: Any) -> str:
    """What the outputs of a cell say."""
    found = [each.get("text") or each.get("data", {}).get("text/plain") for each in cell.outputs]
    return "".join(text for text in found if text)


def cells_of(run: RunDir) -> str:
    """The file that a run's task is in."""
    import yaml

    task: str = yaml.safe_load(run.resolved.read_text())["task"]
    return task.partition(":")[0]
