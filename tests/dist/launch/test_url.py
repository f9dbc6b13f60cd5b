"""Runs at a URL, on a real S3 server: kept there, found and gone on with from another host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import list_runs
from support.errors import assert_shown
from support.launch import OFTEN, SLOW, TINY, dtrain, started, until
from support.s3 import BUCKET, KEYS, S3, make_bucket

RUNS = f"s3://{BUCKET}/runs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with S3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path / "here"))
    return server


def test_a_killed_run_goes_on_from_another_host(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ("--set", "args.pause=0", "--procs", "2", TINY)
    whole = dtrain("launch", *SLOW, *quick, cwd=tmp_path)
    make_bucket()
    with started(
        "launch", "--runs", RUNS, *SLOW, *OFTEN, "--procs", "2", TINY, cwd=tmp_path
    ) as process:
        place = RemoteStore(RUNS)
        until("a checkpoint", lambda: place.matching("*/checkpoints/step-*/manifest.json"), 90)
        process.kill()
        process.communicate(timeout=30)
    lost = dtrain("status", "--runs", RUNS, "--json", cwd=tmp_path)
    assert json.loads(lost.stdout)["state"] == "lost"  # and what was not there yet is pushed
    resume = ("resume", "--runs", RUNS, "--set", "args.pause=0")
    with ExitStack() as stack:  # two other hosts at once
        hosts = {
            name: stack.enter_context(
                started(*resume, cwd=tmp_path, env={"DTRAIN_STAGING": str(tmp_path / name)})
            )
            for name in ("a host", "another")
        }
        output = {name: process.communicate(timeout=90)[0] for name, process in hosts.items()}
    codes = {process.returncode: name for name, process in hosts.items()}
    assert set(codes) == {0, 2}, output
    assert_shown(output[codes[2]], "run.held", f"process {hosts[codes[0]].pid} on")
    assert "resumed from step-" in output[codes[0]]
    # the same parameters
    assert output[codes[0]].splitlines()[-1] == whole.stdout.splitlines()[-1]
    monkeypatch.setenv("DTRAIN_STAGING", str(tmp_path / codes[0]))
    here, elsewhere = (list_runs(next((tmp_path / n).glob("s3-*"))) for n in ("here", codes[0]))
    assert here[0].id == elsewhere[0].id
    assert not list(elsewhere[0].checkpoints.glob("step-*"))  # they are at the URL
    (row,) = json.loads(dtrain("runs", "--runs", RUNS, "--json", cwd=tmp_path).stdout)
    assert (row["state"], row["step"], row["attempt"]) == ("succeeded", 60, 1)
    assert f"{RUNS}/{row['id']}" == row["url"]
    logs = dtrain("logs", "--runs", RUNS, "--rank", "1", "--attempt", "0", cwd=tmp_path)
    assert logs.returncode == 0, logs.stderr
    out = tmp_path / "model.safetensors"
    made = dtrain("export", "--to", "safetensors", "--output", out, "--runs", RUNS, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert out.exists()
    everything = b"".join(place.read(name) or b"" for name in place.files())
    assert not [key for key in KEYS.values() if key.encode() in everything]


@pytest.mark.parametrize(
    ("arguments", "env", "code", "name"),
    [
        (("--runs", "s3://nobodys-bucket/runs"), {}, "url.not-found", "s3://nobodys-bucket/runs"),
        (("--runs", RUNS), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "url.unreachable", RUNS),
        (("--runs", RUNS), {name: "" for name in KEYS}, "url.no-access", RUNS),
        (("--runs", "s4://bucket/runs"), {}, "url.invalid", "Protocol not known: s4"),
        (("--runs", RUNS, "--launcher", "slurm"), {}, "plan.launcher-needs-directory", "'slurm'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    s3: S3, tmp_path: Path, arguments: tuple[str, ...], env: dict[str, str], code: str, name: str
) -> None:
    done = dtrain("launch", *arguments, TINY, cwd=tmp_path, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert_shown(done.stderr, code, name)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_commands_that_read_a_url_that_does_not_answer(s3: S3, tmp_path: Path) -> None:
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = dtrain("status", "--runs", RUNS, cwd=tmp_path, env=away)
    assert (done.returncode, done.stdout) == (2, "")
    assert_shown(done.stderr, "url.unreachable", RUNS)
    done = dtrain("why", "nix", "--runs", f"s3://{BUCKET}/empty", cwd=tmp_path)
    assert done.returncode == 2
    assert_shown(done.stderr, "run.no-runs", f"s3://{BUCKET}/empty")
