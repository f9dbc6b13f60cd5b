"""The plan: everything that a launch would do, and nothing started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning  # noqa: F401  sets variables once, which a test would seem to leave behind

from dtrain import catalog
from dtrain.environ import MASK, is_secret, masked, secret, shown
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.launchers import base
from dtrain.run.files import write_json
from dtrain.run.rundir import RunDir
from support.errors import raises

FACTS = Facts("digits-abc234", "/runs", "/usr/bin/python3", "laptop", cores=8, free_port=16000)


def job(**fields: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "digits", "task": "task.py:T", "train": {"epochs": 1, "global_batch_size": 8}}
        | fields
    )


def plan_of(spec: JobSpec, launcher: str = "local", **options: Any) -> LaunchPlan:
    made = make_plan(
        spec,
        job_dir="/job",
        launcher=launcher,
        profile=launcher,
        options=AnyOptions(**options),
        facts=FACTS,
    )
    return base.load(launcher).complete(made, FACTS)


def test_two_simulated_nodes() -> None:
    plan = plan_of(job(launch={"nodes": 2, "procs_per_node": 2}))
    assert (plan.world_size, plan.node_names) == (4, ("node-0", "node-1"))
    assert plan.threads_per_proc == 2
    assert plan.worker_env["OMP_NUM_THREADS"] == "2"
    assert (plan.device, plan.backend) == ("cpu", "gloo")
    (command,) = plan.commands
    assert command.argv == (
        "/usr/bin/python3", "-P", "-m", "dtrain.node", "/runs/digits-abc234",
        "--node-rank", "0", "--node-rank", "1",
    )  # fmt: skip


def test_gpus_make_the_processes() -> None:
    plan = plan_of(job(launch={"gpus_per_node": 4}))
    assert (plan.procs_per_node, plan.device, plan.backend) == (4, "cuda", "nccl")
    assert plan.node_names == ("laptop",)


def test_dp_is_one_process_with_replicas() -> None:
    plan = plan_of(job(strategy="dp", launch={"procs_per_node": 4}))
    assert (plan.procs_per_node, plan.replicas, plan.world_size) == (1, 4, 1)


@pytest.mark.parametrize(
    ("fields", "code", "names"),
    [
        (
            {"strategy": "single", "launch": {"procs_per_node": 2}},
            "plan.single-is-one-process",
            ("'single'", "2", "'ddp'"),
        ),
        (
            {"strategy": "single", "launch": {"nodes": 2}},
            "plan.unsupported-combination",
            ("'single'", "2", "'ddp'"),
        ),
        (
            {"strategy": "dp", "launch": {"nodes": 2}},
            "plan.unsupported-combination",
            ("'dp'", "--nodes 1"),
        ),
        (
            {"launch": {"gpus_per_node": 2, "procs_per_node": 4}},
            "plan.more-processes-than-gpus",
            ("4 processes", "2 GPUs", "--procs 2"),
        ),
    ],
)
def test_what_does_not_go_together(
    fields: dict[str, Any], code: str, names: tuple[str, ...]
) -> None:
    with raises(code, *names):
        plan_of(job(**fields))


def test_a_plan_survives_its_json(tmp_path: Path) -> None:
    plan = replace(plan_of(job(launch={"nodes": "1:2"}), launcher="local"), run_dir=str(tmp_path))
    write_json(plan.run.plan, plan.to_json())
    assert LaunchPlan.read(plan.run).to_json() == plan.to_json()
    with raises("run.no-plan", str(tmp_path / "nothing")):
        LaunchPlan.read(type(plan.run)(tmp_path / "nothing"))


def test_secrets_are_shown_by_name_only() -> None:
    env = {"WANDB_API_KEY": "s3cret", "MY_TOKEN": "t0ken", "DB": "pg://me:pa55@host/x"}
    spec = job(launch={"env": {**env, "LEVEL": "3"}})
    text = json.dumps(plan_of(spec).to_json())
    assert not [value for value in env.values() if value in text]
    assert masked(spec.launch.env) == {**dict.fromkeys(env, MASK), "LEVEL": "3"}
    assert secret(spec.launch.env) == env


@pytest.mark.parametrize(
    "name",
    [
        "PGPASS",
        "MYSQL_PWD",
        "SENTRY_DSN",
        "SLACK_WEBHOOK",
        "COOKIE",
        "BEARER",
        "SSH_PRIVATE",
        "AZURE_SAS",
        "DB_PASS",
        "apiKey",
        "PASSWORD1",
        "SECRETKEY",
        "HTTP_AUTH",
        "TOKEN2",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ],
)
def test_a_word_of_a_name_makes_it_secret(name: str) -> None:
    assert is_secret(name, "x")


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "PATH",
        "COMPASS",
        "PASSENGERS",
        "BYPASS",
        "TOKENIZERS_PARALLELISM",
        "AUTHOR",
        "KEYBOARD",
        "SASH",
        "DATABASE_URL",
        "N_PASSES",
    ],
)
def test_a_part_of_a_word_does_not(name: str) -> None:
    assert not is_secret(name, "x")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("postgres://u:pw@h/db", True),
        ("redis://:pw@h:6379", True),
        ("https://x.blob.example/a?sv=1&sig=abcdefghij", True),
        ("hf_abcdefghijklmnopqrst", True),
        ("ghp_abcdefghijklmnopqrst", True),
        ("sk-proj-abcdefghijklmnop", True),
        ("AKIAIOSFODNN7EXAMPLE", True),
        ("xoxb-12345678-abc", True),
        ("http://host:8080/a", False),
        ("s3://bucket/a@b", False),
        ("mysql://u@h/db", False),
        ("hf_cache", False),
        ("sk-small", False),
    ],
)
def test_a_value_is_secret_by_its_form(value: str, expected: bool) -> None:
    assert is_secret("X", value) is expected


def test_what_is_secret_in_arguments_is_not_shown() -> None:
    given = ["--lr", "0.1", "--api-key", "abc", "--token=x1", "--verbose", "file", "pg://u:pw@h"]
    assert shown("arguments", given) == [
        "--lr", "0.1", "--api-key", MASK, f"--token={MASK}", "--verbose", "file", MASK
    ]  # fmt: skip
    assert shown("args", {"a": {"max_tokens": 5, "db_password": "x", "name": "y", "no": []}}) == {
        "a": {"max_tokens": 5, "db_password": MASK, "name": "y", "no": []}
    }
    plain = {"pad_token": "[PAD]", "image_key": "left_image", "key": "label", "tokens": "bpe"}
    assert shown("args", plain) == plain
    hidden = {"token": "a1b2c3", "api_key": "abc", "key": "abcdefghijklmnopqrstuvwxyz"}
    assert shown("args", hidden) == dict.fromkeys(hidden, MASK)


def test_torchrun_on_one_host_needs_no_options() -> None:
    plan = plan_of(job(launch={"procs_per_node": 4}), "torchrun")
    assert (plan.rdzv_host, plan.rdzv_port) == ("127.0.0.1", 16000)
    start, by_hand = plan.commands
    assert start.argv[-2:] == ("--node-rank", "0")
    assert by_hand.argv[:4] == ("torchrun", "--nnodes=1", "--node-rank=0", "--nproc-per-node=4")
    assert by_hand.argv[-4:] == ("-P", "-m", "dtrain.worker", "/runs/digits-abc234")


def test_torchrun_on_several_hosts_writes_the_same_plan_but_for_the_node() -> None:
    spec = job(launch={"nodes": 2, "procs_per_node": 4})
    first = plan_of(spec, "torchrun", node_rank=0, rdzv_endpoint="head:29400")
    second = plan_of(spec, "torchrun", node_rank=1, rdzv_endpoint="head:29400")
    assert (first.rdzv_host, first.rdzv_port) == ("head", 29400)
    same = {"options", "commands"}
    assert {k: v for k, v in first.to_json().items() if k not in same} == {
        k: v for k, v in second.to_json().items() if k not in same
    }


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        ({}, "torchrun.no-node-rank", ("--node-rank 0 … 1",)),
        ({"node_rank": 0}, "torchrun.no-endpoint", ("--rdzv-endpoint HOST:PORT",)),
        ({"node_rank": 2}, "torchrun.invalid-node-rank", ("--node-rank 2", "2 nodes")),
        ({"node_rank": 0, "rdzv_endpoint": "head"}, "torchrun.invalid-endpoint", ("'head'",)),
        ({"node_rank": 0, "rdzv_endpoint": "head:99999"}, "torchrun.invalid-endpoint", ("99999",)),
        ({"nodes_rank": 0}, "option.unknown-field", ("option nodes_rank", "'node_rank'?")),
    ],
)
def test_torchrun_says_which_flag_is_missing(
    options: dict[str, Any], code: str, names: tuple[str, ...]
) -> None:
    with raises(code, *names):
        plan_of(job(launch={"nodes": 2}), "torchrun", **options)


def test_catalog_names_what_it_does_not_have() -> None:
    with raises("plan.unknown-name", "launcher 'slum'", "local, torchrun"):
        catalog.find("launcher", "slum")
    for kind in ("launcher", "strategy", "trainer"):
        for name in catalog.names(kind):
            assert catalog.load(kind, name)


def test_safe_imports_of_the_task_are_done_once_per_node() -> None:
    facts = replace(FACTS, task_imports=("torch", "sklearn.datasets", "pytorch_lightning", "numpy"))

    def preload(facts: Facts = facts, trainer: str = "native", **launch: Any) -> tuple[str, ...]:
        made = make_plan(
            job(launch=launch, trainer=trainer), job_dir="/job", launcher="local", profile="local",
            options=AnyOptions(), facts=facts,
        )  # fmt: skip
        return made.preload

    assert preload() == ("sklearn.datasets", "numpy")
    assert preload(preload=[]) == ()
    assert preload(preload=["mine"]) == ("mine",)
    # of Lightning's two packages the one that the task is written with
    assert preload(trainer="lightning") == ("sklearn.datasets", "pytorch_lightning", "numpy")
    assert preload(FACTS, "lightning") == ("pytorch_lightning",)
    other = replace(FACTS, task_imports=("lightning.pytorch",))
    assert preload(other, "lightning") == ("lightning.pytorch",)


def test_the_imports_of_a_task_are_read_without_importing_it(tmp_path: Path) -> None:
    from dtrain.job.imports import installed_imports

    text = "import torch, os.path as p\nfrom sklearn.datasets import a\nfrom . import b\n1/0\n"
    text += "try:\n    import no_such_package\nexcept ImportError: ...\n"
    (tmp_path / "task.py").write_text(text + "try:\n    import numpy\nexcept ImportError: ...\n")
    found = ("torch", "os.path", "sklearn.datasets", "numpy")
    assert installed_imports(job(), tmp_path) == found
    program = JobSpec.model_validate({"name": "p", "module": "task"})
    assert installed_imports(program, tmp_path) == found
    command = JobSpec.model_validate({"name": "p", "command": ["task.py"]})
    assert installed_imports(command, tmp_path) == ()


def test_a_run_directory_may_be_moved(tmp_path: Path) -> None:
    made = plan_of(job())
    before = replace(made, run_dir=str(tmp_path / "a"), code_dir=str(tmp_path / "a/code/job-0"))
    write_json(before.run.plan, before.to_json())
    (tmp_path / "a").rename(tmp_path / "b")
    after = LaunchPlan.read(RunDir(tmp_path / "b"))
    assert (after.run_dir, after.code_dir) == (str(tmp_path / "b"), str(tmp_path / "b/code/job-0"))


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_launchers_that_need_a_shared_folder_take_no_url(launcher: str) -> None:
    facts = replace(FACTS, runs_url="s3://bucket/runs")
    with raises("plan.launcher-needs-directory", repr(launcher), "'local' and 'ray'"):
        make_plan(
            job(),
            job_dir="/job",
            launcher=launcher,
            profile=launcher,
            options=AnyOptions(),
            facts=facts,
        )


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"strategy": "exact"}, ("strategy 'exact'", "use 'ddp'")),
        ({"launch": {"nodes": (1, 2)}}, ("launch.nodes", "2 different")),
        ({"launch": {"procs_per_node": 9}}, ("global_batch_size is 8", "9 processes")),
    ],
)
def test_what_a_stream_that_shards_itself_cannot_have(fields: Any, names: tuple[str, ...]) -> None:
    plan_of(job(data={"stream": "sharded"}, launch={"procs_per_node": 8}))
    with raises("plan.sharded-stream", *names):
        plan_of(job(data={"stream": "sharded"}, **fields))
