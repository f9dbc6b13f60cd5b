"""The config file of Accelerate that a job names, read without Accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.errors import JobError
from dtrain.job.load import LoadedJob, flag, load_job
from dtrain.job.located import Located, SourceLocation
from support.errors import assert_problems

CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 2
num_processes: 4
use_cpu: true
mixed_precision: bf16
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("print(1)\n")


def loaded(config: str, more: str = "", **given: object) -> LoadedJob:
    Path("accelerate.yaml").write_text(config)
    job = f"name: a\nscript: train.py\naccelerate_config: accelerate.yaml\n{more}"
    Path("job.yaml").write_text(job)
    return load_job("job.yaml", **given)  # type: ignore[arg-type]


def sizes(job: LoadedJob) -> tuple[int, int | None, int]:
    launch = job.spec.launch
    return launch.nodes[1], launch.procs_per_node, launch.gpus_per_node


def test_the_sizes_come_from_the_config_unless_the_job_or_a_flag_has_them() -> None:
    place = SourceLocation("launchers/x.yaml", 3, 1)
    profile = {"procs_per_node": Located(8, place), "gpus_per_node": Located(8, place)}
    job = loaded(CONFIG, profile_launch=profile)
    assert sizes(job) == (2, 2, 8)
    source = "accelerate config (accelerate.yaml:4)"
    assert job.sources["launch.procs_per_node"] == source
    assert sizes(loaded(CONFIG, "launch: {nodes: 1}\n")) == (1, 2, 0)
    flags = {"launch.procs_per_node": flag("--procs", 3)}
    assert sizes(loaded(CONFIG, flags=flags)) == (2, 3, 0)
    on_gpus = CONFIG.replace("MULTI_CPU", "FSDP").replace("use_cpu: true", "use_cpu: false")
    assert sizes(loaded(on_gpus)) == (2, 2, 2)
    assert sizes(loaded("distributed_type: 'NO'\n")) == (1, None, 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("", ("job.accelerate-config", "accelerate.yaml")),
        ("- 1\n", ("job.accelerate-config", "accelerate.yaml")),
        ("a: [\n", ("yaml.syntax", "accelerate.yaml:2:1")),
        ("num_machines: 1\n", ("job.accelerate-config", "accelerate.yaml:1:1: distributed_type")),
        (CONFIG.replace("MULTI_CPU", "DEEPSPEED"),
         ("job.accelerate-config", "accelerate.yaml:2:19: distributed_type", "DEEPSPEED", "FSDP")),
        (CONFIG.replace("LOCAL_MACHINE", "AMAZON_SAGEMAKER"),
         ("job.accelerate-config", "accelerate.yaml:1:22: compute_environment", "AMAZON")),
        (CONFIG.replace("processes: 4", "processes: 3"),
         ("job.accelerate-config", "accelerate.yaml:4:16: num_processes", "3", "2 machines")),
        (CONFIG.replace("processes: 4", "processes: many"),
         ("job.accelerate-config", "accelerate.yaml:4:16: num_processes", "many")),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named_with_its_place(
    config: str, expected: tuple[str, ...]
) -> None:
    with pytest.raises(JobError) as caught:
        loaded(config)
    assert_problems(caught.value.problems[:1], expected)


def test_the_file_must_be_there_and_a_task_has_none() -> None:
    Path("job.yaml").write_text("name: a\nscript: train.py\naccelerate_config: other.yaml\n")
    with pytest.raises(JobError) as caught:
        load_job("job.yaml")
    assert_problems(caught.value.problems, ("file.not-found", "other.yaml"))
    text = "name: a\ntask: train.py:T\ntrain: {steps: 1, global_batch_size: 1}\n"
    Path("job.yaml").write_text(f"{text}accelerate_config: accelerate.yaml\n")
    Path("accelerate.yaml").write_text(CONFIG)
    with pytest.raises(JobError) as caught:
        load_job("job.yaml")
    found = [(each.code, each.field) for each in caught.value.problems]
    assert ("job.field-without-effect", "accelerate_config") in found
