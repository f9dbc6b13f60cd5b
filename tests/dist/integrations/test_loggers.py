"""Metrics go where the job says, with the libraries themselves; a logger never stops training."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dtrain import catalog, ports
from dtrain.job.load import load_job
from dtrain.job.spec import JobSpec
from support.errors import assert_problems
from support.launch import wait_for
from support.trainings import job, lines, train

# Two sessions of one run in a process of their own, since trackers start threads and processes:
# the first ends after step 5, the second begins again from a checkpoint of step 2.
SESSIONS = """
import json, logging, os, sys
from pathlib import Path
from dtrain.job.spec import JobSpec
from dtrain.run.rundir import RunDir
from dtrain.train.metrics.writer import Metrics
logging.basicConfig(format="%(message)s")
run = RunDir(sys.argv[1]); run.create()
log = {"loggers": json.loads(sys.argv[2])}
train = {"steps": 7, "global_batch_size": 64}
spec = JobSpec.model_validate({"name": "t", "task": "t:T", "train": train, "log": log})
def session(done, last, outcome):
    metrics = Metrics(run, spec, active=True)
    metrics.begin(done)
    for step in range(done + 1, last + 1):
        metrics.write("train", step, 0, {"loss": 1 / step})
    metrics.write("eval", last, 0, {"accuracy": 0.5})
    metrics.outcome = outcome
    metrics.close()
session(0, 5, "failed")
session(2, 7, "finished")
"""


def tracked(
    folder: Path, entries: list[Any], reader: str, env: dict[str, str] | None = None
) -> tuple[Any, str]:
    """What a tracker has of the two sessions, as `reader` finds it, and what was said."""
    run = folder / "digits-abc"
    done = subprocess.run(
        [sys.executable, "-c", f"{SESSIONS}\n{reader}", str(run), json.dumps(entries)],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=folder,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(entries) > 1 or "is left out" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where a tracker is not installed; only small ones come with the dev extra."""
    from importlib.util import find_spec

    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


READ_MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
experiment = client.get_experiment_by_name("digits").experiment_id
(found,) = client.search_runs([experiment])
history = client.get_metric_history(found.info.run_id, "train/loss")
values = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "eval/accuracy")}
print(json.dumps([[m.step for m in history], values, found.info.status, found.data.params]))
"""


def check_mlflow(found: Any) -> None:
    steps, accuracy, status, params = found
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert accuracy == {"5": 0.5, "7": 0.5}
    assert status == "FINISHED"
    assert params["train.global_batch_size"] == "64"


@needs("mlflow")
def test_mlflow_in_a_folder_and_a_dead_server(tmp_path: Path) -> None:
    """The first is written to; the second costs one warning when it is made, and nothing else."""
    with socket.socket() as nobody:  # bound and not listening: refused
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        dead = {"mlflow": {"tracking_uri": f"http://127.0.0.1:{port}"}}
        store = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri()}
        found, said = tracked(
            tmp_path, [{"mlflow": {"experiment": "digits"}}, dead], READ_MLFLOW, store
        )
    check_mlflow(found)
    warned = re.findall(r"logger mlflow failed and is not used any more: .*", said)
    assert len(warned) == 2  # one a session
    assert all(str(port) in line for line in warned)


@needs("mlflow")
@needs("sqlalchemy")  # what the server needs besides mlflow-skinny
def test_mlflow_server(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as address:
        entry = {"mlflow": {"experiment": "digits", "tracking_uri": address}}
        env = {"MLFLOW_TRACKING_URI": address}
        found, _ = tracked(tmp_path, [entry], READ_MLFLOW, env)
    check_mlflow(found)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real server on loopback, in a process group of its own, which ends with the test."""
    port = ports.free_candidate("127.0.0.1", str(folder))
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--default-artifact-root", str(folder / "artifacts")]
    log = (folder / "server.log").open("w")
    # its job runner starts a dozen processes, for evaluations that nobody asks for
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True
    )
    try:
        up = wait_for(lambda: answers(port) or server.poll() is not None, 180)
        assert up, (folder / "server.log").read_text()[-2000:]
        assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 9)
        server.wait(timeout=30)
        log.close()


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# wandb keeps records as LevelDB logs: blocks of 32 KiB, each part with checksum, length and kind.
READ_WANDB = """
import time
from wandb.proto.wandb_internal_pb2 import Record
def records(data):
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):
            return  # it is being written
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""
def all_records():
    return [
        record
        for path in sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb"))
        for record in records(path.read_bytes())
    ]
def ends():
    return sum(record.WhichOneof("record_type") == "exit" for record in all_records())
deadline = time.monotonic() + 60
while ends() < 2 and time.monotonic() < deadline:
    time.sleep(0.1)  # a process of wandb's own writes, on a busy machine after finish() too
steps, config, runs = [], {}, []
for record in all_records():
    if record.WhichOneof("record_type") == "run":
        runs.append(record.run.run_id)
        items = record.run.config.update
        config.update({i.key or i.nested_key[0]: i.value_json for i in items})
    if record.WhichOneof("record_type") == "history":
        row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        steps += [row["step"]] * ("train/loss" in row)
print(json.dumps([steps, sorted(set(runs)), config]))
"""


@needs("wandb")
def test_weights_and_biases_offline(tmp_path: Path) -> None:
    entry = {"wandb": {"mode": "offline", "project": "digits"}}
    (steps, runs, config), _ = tracked(tmp_path, [entry], READ_WANDB)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert runs == ["digits-abc"]
    assert config["train.global_batch_size"] == "64"


READ_COMET = """
import zipfile
steps, keys = [], set()
for path in sorted(Path(sys.argv[1]).glob("comet/*.zip"), key=lambda path: path.stat().st_mtime):
    with zipfile.ZipFile(path) as archive:
        keys.add(json.loads(archive.read("experiment.json"))["offline_id"])
        for line in archive.read("messages.json").decode().splitlines():
            metric = (json.loads(line)["payload"] or {}).get("metric")
            if metric and metric["metricName"] == "train/loss":
                steps.append(metric["step"])
print(json.dumps([steps, len(keys)]))
"""


@needs("comet_ml")
def test_comet_offline(tmp_path: Path) -> None:
    (steps, keys), _ = tracked(tmp_path, [{"comet": {"online": False}}], READ_COMET)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert keys == 1


# -- in a training -----------------------------------------------------------------------------


def logged(folder: Path) -> dict[str, list[int]]:
    """The steps of the training loss, as each logger has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    with (folder / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["loss"]) > 0 for row in rows)
    return {
        "csv": [int(row["step"]) for row in rows],
        "tensorboard": [scalar.step for scalar in board.Scalars("train/loss")],
    }


def logging_job(**sections: Any) -> JobSpec:
    log = {"every_steps": 1, "loggers": ["csv", "tensorboard"]}
    return job(checkpoint={"every_steps": 4}, eval={"every_steps": 5}, log=log, **sections)


@pytest.mark.ranks(1)
def test_steps_are_monotonic_after_a_crash(tmp_path: Path) -> None:
    """Steps 5 to 7 are trained twice, and are in metrics.jsonl twice, but nowhere else."""
    train(logging_job(args={"crash_after": 7, "held_out": 5}), tmp_path)
    train(logging_job(args={"held_out": 5}), tmp_path)
    twice = [line["step"] for line in lines(tmp_path, "metrics") if line["split"] == "train"]
    assert twice == [*range(1, 7), *range(5, 11)]
    assert logged(tmp_path) == {name: [*range(1, 11)] for name in ("csv", "tensorboard")}
    with (tmp_path / "eval.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10"]


@pytest.mark.ranks(2)
def test_only_rank_zero_logs(tmp_path: Path) -> None:
    import torch.distributed as dist

    train(logging_job(strategy="ddp"), tmp_path / f"rank{dist.get_rank()}")
    made = (tmp_path / f"rank{dist.get_rank()}" / "train.csv").exists()
    assert made == (dist.get_rank() == 0)


class Faulty:
    """A logger from outside that fails where it is told to, and draws random numbers."""

    supports_rewind = False

    def __init__(self, opening: Any, when: str = "") -> None:
        import torch

        torch.rand(1)
        self.when = when
        self._fail("made")

    def write(self, *_: Any) -> None:
        self._fail("written to")

    def close(self, *_: Any) -> None:
        self._fail("closed")

    def _fail(self, now: str) -> None:
        if now == self.when:
            raise RuntimeError(f"no luck when {now}")


@pytest.mark.parametrize("when", ["made", "written to", "closed", "never"])
def test_a_faulty_logger_never_stops_training(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fact = catalog.Fact(f"{__name__}:Faulty")
    monkeypatch.setitem(catalog.LOGGERS, "faulty", fact)  # type: ignore[arg-type]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good
    plain = train(job(args={"dropout": 0.5}), tmp_path / "plain")
    log = {"every_steps": 1, "loggers": [{"faulty": {"when": when}}, "csv"]}
    with caplog.at_level(logging.WARNING):
        outcome = train(job(args={"dropout": 0.5}, log=log), tmp_path / "run")
    assert outcome.result is not None
    assert plain.result is not None
    assert outcome.result.parameters_sha256 == plain.result.parameters_sha256
    said = [record.message for record in caplog.records if "logger" in record.message]
    line = f"logger faulty failed and is not used any more: RuntimeError: no luck when {when}"
    assert said == ([] if when == "never" else [line])
    assert len((tmp_path / "run" / "train.csv").read_text().splitlines()) == 11


# -- before anything starts --------------------------------------------------------------------


def written(folder: Path, loggers: str) -> Path:
    (folder / "t.py").write_text("class T: ...\n")
    path = folder / "job.yaml"
    path.write_text(
        "name: t\ntask: t.py:T\ntrain: {steps: 1, global_batch_size: 1}\n"
        f"log:\n  loggers:\n{loggers}"
    )
    return path


def test_entries_are_kept_as_written(tmp_path: Path) -> None:
    path = written(tmp_path, "    - csv\n    - tensorboard: {max_queue: 1}\n")
    assert load_job(path).spec.log.loggers == ["csv", {"tensorboard": {"max_queue": 1}}]


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("mlfow", ["'mlfow'", "csv, tensorboard, mlflow, wandb, comet", "'mlflow'"]),
        ("3", ["logger", "number 3"]),
        ("wandb: yes", ["options of wandb"]),
    ],
)
def test_wrong_entries(entry: str, names: list[str], tmp_path: Path) -> None:
    from dtrain.errors import JobError

    with pytest.raises(JobError) as caught:
        load_job(written(tmp_path, f"    - {entry}\n"))
    (problem,) = caught.value.problems
    place = f"{tmp_path}/job.yaml:6:7: log.loggers[0]"
    assert_problems([problem], ("job.invalid-value", place, *names))
    assert "\n" not in str(problem)


def test_a_missing_package_is_named_with_its_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name of a package that nobody has: what is installed here differs."""
    from dtrain.errors import JobError

    fact = catalog.Fact("dtrain.none:None", catalog.Needs(("no_such_tracker",), "wandb"))
    monkeypatch.setitem(catalog.LOGGERS, "wandb", fact)  # type: ignore[arg-type]
    with pytest.raises(JobError) as said:
        load_job(written(tmp_path, "    - csv\n    - wandb: {mode: offline}\n"))
    assert said.value.exit_code == 2
    assert str(said.value).endswith(
        "job.yaml:7:7: log.loggers[1]: logger 'wandb' needs no_such_tracker: "
        "pip install 'dtrain[wandb]'"
    )
